"""Fit trained adapters again by `quailora.finish`, and score them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from quailora import finish
from quailora.core.objective import Factors
from quailora.models.locate import resolve
from quailora.training.finish import saved_factors

from .arms import ARMS
from .data import calibration_batches
from .protocol import Run
from .runs import Bench
from .training import base_of


def finished(bench: Bench, run: Run, recipe: str) -> dict[str, Any]:
    """Return the scores of a trained run whose adapter was fitted again.

    Args:
        bench: where the run was carried out; its trained adapter is there.
        run: a run of an arm on the stock base.
        recipe: recipe that fits the adapter.
    """
    arm = ARMS[run.arm]
    trained = bench.folder / "adapters" / run.key
    start = bench.start(run)
    base = base_of(arm, start, bench.protocol)
    initial = None if start is None else saved_factors(start)
    if arm.keeps_its_start:
        assert start is not None
        model = joined(base, saved_factors(trained / "start"), saved_factors(trained))
    else:
        model = PeftModel.from_pretrained(base, trained, is_trainable=True)
    data = bench.data()
    batches = calibration_batches("train", bench.texts, None, data, bench.protocol)
    finish(model, batches, initial=initial, weights=resolve(bench.protocol.model), recipe=recipe)
    return {
        **run.as_dict(),
        "key": f"{run.key}-finished-{recipe}",
        "arm": f"{run.arm}-finished-{recipe}",
        "of": run.key,
        "after": bench.score(model.train()),
    }


@torch.no_grad()
def joined(base: Any, start: dict[str, Factors], fresh: dict[str, Factors]) -> Any:
    """Return a model with two adapters in one, of the sum of their ranks."""
    first, second = next(iter(start.values())), next(iter(fresh.values()))
    rank = len(first.lora_A) + len(second.lora_A)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, pair in start.items():
        module = model.get_base_model().get_submodule(name)
        module.lora_A["default"].weight.copy_(torch.cat([pair.lora_A, fresh[name].lora_A]))
        module.lora_B["default"].weight.copy_(torch.cat([pair.lora_B, fresh[name].lora_B], 1))
    return model
