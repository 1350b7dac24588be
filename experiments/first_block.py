"""Train the first block of a model in several ways, which all begin with the same closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from quailora import Uniform
from quailora.calibration.examples import BlockExamples
from quailora.calibration.walk import Block
from quailora.methods.block_training import BlockTraining, aim_beside
from quailora.models.layers import block_of
from quailora.pipeline.run import ModelRun
from quailora.pipeline.store import corrections_of
from quailora.pipeline.trained_blocks import compensated, weight_of

from .signed_steps import signed_steps

BLOCKS: dict[str, BlockTraining] = {
    "factors": BlockTraining(parts=("factors",)),
    "factors and scales": BlockTraining(parts=("scales", "factors")),
    "the same, twice as long": BlockTraining(400, parts=("scales", "factors")),
    "the same, factors at 3e-4": BlockTraining(parts=("scales", "factors"), factor_rate=3e-4),
    "the same, factors at 3e-3": BlockTraining(parts=("scales", "factors"), factor_rate=3e-3),
    **{f"factors, scales and codes at {rate:g}": BlockTraining(code_rate=rate) for rate in (1e-3, 5e-3, 2e-2)},
}
"""Settings that are tried out with an adapter."""

ALONE: dict[str, BlockTraining] = {
    "scales": BlockTraining(parts=("scales",)),
    "scales and codes at 0.001": BlockTraining(code_rate=1e-3, parts=("codes", "scales")),
    "scales and codes at 0.005": BlockTraining(code_rate=5e-3, parts=("codes", "scales")),
}
"""The same without one."""

SIGNED: dict[str, BlockTraining] = {
    "signed steps, from nearest": BlockTraining(),
    "signed steps, twice as long": BlockTraining(400),
}
"""Trainings by signed steps, which start with codes rounded to nearest, as those of the package auto-round do."""


def trained_first_block(
    run: ModelRun, quantizer: Uniform, *, signed: bool, adapters: bool
) -> dict[str, tuple[float, float]]:
    """Return the error of the first block on held-out tokens in closed form and after each training, by its name.

    Args:
        run: the run that makes the closed form.
        quantizer: the quantizer of the base.
        signed: whether to train by signed steps, in place of the trainings here.
        adapters: whether layers have adapters.
    """
    first = block_of(next(iter(run.walk.layers)))
    layers = {name: layer for name, layer in run.walk.layers.items() if block_of(name) == first}
    walk = replace(run.walk, layers=layers, batch_tokens=BlockTraining.tokens)
    replace(run, walk=walk).finish()
    errors: dict[str, tuple[float, float]] = {}

    def visit(block: Block) -> Mapping[str, Tensor]:
        return {name: compensated(run.store.load(name)) for name in block.layers}

    def train(examples: BlockExamples, names: Sequence[str]) -> Mapping[str, Tensor]:
        stored = {name: run.store.load(name) for name in names}
        corrections = corrections_of(stored) if adapters else {}
        if signed:
            weights = {name: weight_of(one, BlockTraining()) for name, one in stored.items()}
            before = BlockTraining(0).improve(examples, layers, weights, corrections).before
            aims = {
                name: aim_beside(layers[name].weight, weight, corrections.get(name)) for name, weight in weights.items()
            }
            for setting, training in SIGNED.items():
                errors[setting] = before, signed_steps(examples, layers, aims, corrections, quantizer, training)
            return {}
        for setting, training in (BLOCKS if adapters else ALONE).items():
            weights = {name: weight_of(one, training) for name, one in stored.items()}
            found = training.improve(examples, layers, weights, corrections)
            errors[setting] = found.before, found.after
        return {}

    walk.run(visit, train)
    return errors
