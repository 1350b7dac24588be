"""Descriptions of a run as plain data: the options that ask for it, and everything that its layers depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..adapters.lora import LoraScaling
from ..calibration.sources import TextCalibration
from ..methods.distillation import Distillation
from ..methods.method import Method
from ..methods.recipes import find_recipe
from ..models.layers import ALL_LINEAR
from ..schedules import Once
from ..support.settings import describe
from .options import Output
from .plan import RunPlan, title_of


def options_of(plan: RunPlan) -> dict[str, Any] | None:
    """Return the options of `quailora init` that ask for the same run; None if there are none that do.

    There are none for a model in memory, for batches of tokens, and for a method that is put together in another way
    than the options can.
    """
    method, source = plan.method, plan.source
    distillation = method.distillation
    if plan.fine_tuned is not None or not isinstance(plan.model, str):
        return None
    if not isinstance(source, TextCalibration) or not can_be_named(method):
        return None
    calibration, scaling, resources = source.calibration, method.scaling, plan.resources
    composed = {
        "solver": describe(method.initializer.solver),
        "metric": describe(method.initializer.weighting),
        "inputs": method.inputs,
    }
    output = plan.output or Output("")
    quantizer = method.requested_quantizer or method.quantizer
    planned = method.budget is not None  # and then the plan has bits, ranks and targets
    return {
        "model": plan.model,
        "plan": method.budget,
        "quantizer": None if quantizer is None or planned else describe(quantizer),
        "base": method.base.checkpoint if method.base is not None else None,
        "recipe": method.recipe,
        "family": describe(method.initializer.family),
        **(composed if method.recipe is None else {}),
        "rank": scaling.rank if method.family.default_rank is not None and not planned else None,
        "frozen_rank": method.frozen_rank,
        "distill": 0 if distillation is None else distillation.steps,
        "distill_tokens": None if distillation is None else distillation.tokens,
        "distill_rate": None if distillation is None else distillation.learning_rate,
        "alpha": scaling.alpha_for(LoraScaling.rank, scaling.scale_of("")) if planned else scaling.alpha,
        "rslora": scaling.rslora,
        "rank_pattern": None if planned else dict(scaling.rank_pattern) or None,
        "alpha_pattern": None if planned else dict(scaling.alpha_pattern) or None,
        "targets": [ALL_LINEAR] if planned else list(plan.targets),
        "factors_dtype": output.factors_dtype,
        "modules_to_save": list(output.modules_to_save),
        "calibration": calibration.text.source,
        "calibration_fields": list(calibration.text.fields),
        "calibration_split": calibration.text.split,
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "bos": calibration.bos,
        "seed": calibration.seed,
        "calibration_dtype": calibration.dtype,
        "dtype": resources.dtype,
        "device": resources.device,
        "offload": resources.offload,
        "memory_limit": resources.memory_limit,
        "allow_pickle": resources.allow_pickle,
        "trust_remote_code": resources.trust_remote_code,
        "save_base": output.save_base,
        "base_format": output.base_format,
    }


def can_be_named(method: Method) -> bool:
    """Return whether options of `quailora init` can say all that a method is."""
    # `config.yaml` repeats a run, so it is written only where options can say all that the run was. A schedule or a
    # training of blocks comes by a recipe on the command line; a method with one of its own has no options. A
    # distillation can be asked for by its steps, tokens and rate, and another target than full precision cannot.
    recipe = None if method.recipe is None else find_recipe(method.recipe)
    if recipe is None and (method.initializer.schedule != Once() or method.blocks is not None):
        return False
    if method.quantizers and method.budget is None:
        return False
    asked = method.distillation
    if asked is not None:
        own = (recipe.distillation if recipe is not None else None) or Distillation()
        asked = own.asked(asked.steps, asked.tokens, asked.learning_rate, asked.sequence_length)
    return asked == method.distillation and (method.base is None or method.base.checkpoint is not None)


def described_plan(plan: RunPlan) -> dict[str, Any]:
    """Return what was asked for, for the report: the options, or what comes closest to them."""
    options = options_of(plan)
    if options is not None:
        return options
    return {
        "model": title_of(plan.model),
        "method": described_method(plan.method),
        "targets": list(plan.targets),
        "calibration": plan.source.described(),
        "recipe": plan.method.recipe,
    }


def described_method(method: Method) -> dict[str, Any]:
    """Return every part of a method that can change a layer."""
    initializer = method.initializer
    return {
        "quantizer": describe(initializer.quantizer),
        "family": describe(initializer.family),
        "solver": describe(initializer.solver),
        "metric": describe(initializer.weighting),
        "schedule": describe(initializer.schedule),
        "inputs": method.inputs,
        "step": method.step if method.inputs == "asymmetric" else None,
        "blocks": describe(method.blocks),
        "distillation": describe(method.distillation),
        "rank": method.scaling.rank,
        "frozen_rank": method.frozen_rank,
        "alpha": method.scaling.alpha,
        "rslora": method.scaling.rslora,
        "rank_pattern": dict(method.scaling.rank_pattern),
        "alpha_pattern": dict(method.scaling.alpha_pattern),
        "quantizers": {name: describe(quantizer) for name, quantizer in method.quantizers.items()},
    }


def depends_on(plan: RunPlan) -> dict[str, Any]:
    """Return each setting that the layers of a run depend on, besides model, tokens and base."""
    settings = described_method(plan.method) | {
        "targets": list(plan.targets),
        "seed": plan.source.seed,
        "calibration_dtype": plan.source.dtype,
        "dtype": plan.resources.dtype,
        "save_base": plan.save_base,
    }
    if plan.fine_tuned is not None:
        settings["trained change"] = plan.fine_tuned.digest
    if isinstance(plan.source, TextCalibration):
        calibration = plan.source.calibration
        settings |= {
            "calibration_fields": list(calibration.text.fields),
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "bos": calibration.bos,
        }
    return dict(flattened(settings))


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with the names on the way to them, joined by dots."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
