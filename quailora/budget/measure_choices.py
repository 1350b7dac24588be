"""Measure what each choice would cost in each layer of a model, from what callers give."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.lora import LoraScaling
from ..bases.writer import is_replaced
from ..calibration.sources import CalibrationSource
from ..calibration.windows import Calibration
from ..errors import ConfigurationError
from ..methods.recipes import find_recipe
from ..models.layers import ALL_LINEAR, Layer, block_of, stock_quantizes
from ..pipeline.checks import warn_of_shipped_text
from ..pipeline.formats import example_by, tensors_in_checkpoints
from ..pipeline.options import Resources
from ..pipeline.plan import CalibrationGiven, RunPlan, plan_run, source_of
from ..quantizers import NF4, Quantizer
from ..support.choices import PLANNED_BITS, PLANNED_LENGTH, PLANNED_RANKS, PLANNED_SAMPLES, StrPath
from ..support.files import folder_of
from ..support.machine import size, within_memory
from .choices import Choice, possible_choices
from .layer_errors import quantizers_of
from .measurements import Measurements
from .measuring import is_written, layers_besides, measure_model, other_bytes
from .plan import Budget
from .question import PlanRecipe, Question

logger = logging.getLogger("quailora")


@within_memory("shorter windows, `device='cpu'`, or a machine with more memory: the whole model has to fit")
def measure_choices(
    model: Any,
    calibration: CalibrationGiven = None,
    *,
    choices: Sequence[Choice] | None = None,
    around: str | None = None,
    recipe: PlanRecipe | None = None,
    state: StrPath | None = None,
    fresh: bool = False,
    resources: Resources = Resources(),  # noqa: B008 # frozen
) -> Measurements:
    """Measure what each choice of bits and rank would cost in each linear layer of a model; see `Planner` for plans.

    One walk through the model quantizes and corrects every layer in every way. Backward passes on held-out text then
    show what the error of each choice costs in the predictions. It takes about twenty minutes for SmolLM2 on one core
    of a CPU.

    Args:
        model: a transformers causal language model in full precision; or its hub name, its folder, a `.gguf` file, or
            "demo". It is held in memory.
        calibration: a text file, folder or data set by name, of which 64 windows of 512 tokens are taken; `Calibration`
            for other windows of it; or batches, as `initialize_model` takes them. Every fourth window is held out. The
            shipped text if None.
        choices: what each layer can become; see `possible_choices`, whose choices for AutoGPTQ's format are the
            default.
        around: the budget that plans will be made for, or one near it: `3.5bits` for each weight, or `2GiB` for the
            whole model. Layers are measured in a network of about this size; of 4 bits if None.
        recipe: what plans are for. "best-joint" chooses the rounding of a base together with the adapter, "best" keeps
            the rounding of the quantizer alone. By default best-joint, unless NF4 in all layers is all there is to
            choose, which packages make while they load a model.
        state: folder that the measurement keeps its state in, about 15 bytes for each weight. With the same arguments
            it goes on from there when it was killed, and takes no time once it is finished. None for a temporary one,
            as for a model in memory, whose weights may have changed since then.
        fresh: forget what is in this folder.
        resources: device and dtype, and what may be read. Weights cannot stay on disk.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    if resources.offload == "always":
        raise ConfigurationError(
            "Costs of layers are measured by gradients of the whole model, which has to be in memory. "
            "Leave out `offload='always'`."
        )
    if state is not None and not isinstance(model, StrPath):
        raise ConfigurationError(
            "Expected the name or the folder of a model beside `state`, got a model in memory. Whether that is still "
            "the one which was measured cannot be told. Name it, or leave out `state`."
        )
    source = source_of(calibration, Calibration(samples=PLANNED_SAMPLES, sequence_length=PLANNED_LENGTH))
    chosen = tuple(possible_choices("gptq", PLANNED_BITS, PLANNED_RANKS) if choices is None else choices)
    if not any(choice.quantizer for choice in chosen):
        raise ConfigurationError("Expected a choice that quantizes layers, got none. There is nothing to plan.")
    budget = None if around is None else Budget(around)
    # NF4 everywhere is the base that every package makes. Any other one has to be written, and then it may be chosen.
    recipe = recipe or ("best" if all(choice.quantizer == NF4() for choice in chosen) else "best-joint")
    plan = planned(model, Question(chosen, chosen[0], recipe), source, resources)
    question = Question(chosen, reference_for(plan, chosen, budget), recipe)
    warn_of_shipped_text(plan.source)
    needed = plan.estimate
    if not plan.on_disk and needed.in_memory > needed.available:  # which raises an error where a limit was given
        logger.warning(
            "Measuring holds the whole model in memory. It needs about %s of %s, and %s may be used.",
            size(needed.in_memory), needed.memory, size(needed.available),
        )  # fmt: skip
    with ExitStack() as held:
        if state is None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="quailora-")))
        else:
            folder = folder_of(state)
            folder.mkdir(parents=True, exist_ok=True)
        return measure_model(plan, question, folder, fresh=fresh)


def planned(model: Any, question: Question, source: CalibrationSource, resources: Resources) -> RunPlan:
    """Return the plan of the walk through a model; only configurations and shapes are read.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    check_one_format(question.choices)
    quantizer = next(choice.quantizer for choice in question.choices if choice.quantizer is not None)
    method = find_recipe(question.recipe).method(quantizer, LoraScaling(1))
    resources = replace(resources, offload="never")  # since gradients of the whole model are taken
    plan = plan_run(model, method, source, [ALL_LINEAR], None, resources)
    check_packable(plan.adapter.layers, quantizer, written=is_written(method, question.choices))
    check_possible(plan.adapter.layers, question.choices)
    return plan


def check_one_format(choices: Sequence[Choice]) -> None:
    """Raise a `ConfigurationError` unless there is a checkpoint that holds layers of all these choices together."""
    quantizers = quantizers_of(choices)
    formats = set(map(tensors_in_checkpoints, quantizers))  # in which they differ
    if len(formats) > 1 or not all(formats):
        raise ConfigurationError(
            "Expected quantizers that one checkpoint holds, such as Uniform of 2, 3, 4 and 8 bits, or NF4 alone, got "
            f"{', '.join(map(repr, quantizers))}. Take the choices of `possible_choices`."
        )


def check_packable(layers: Mapping[str, Layer], quantizer: Quantizer, *, written: bool) -> None:
    """Raise a `ConfigurationError` unless checkpoints hold all layers in the format of a quantizer.

    A base that is written in floating point takes the bytes of full precision, whatever was planned.

    Args:
        layers: the layers.
        quantizer: one of the quantizers to choose from.
        written: whether the base has to be written, because stock packages do not make it while they load a model.
    """
    grouped = "qweight" in example_by(quantizer, next(iter(layers.values())).shape).packed()
    odd = [
        name
        for name, layer in layers.items()
        if not (is_replaced(layer) if written else stock_quantizes(layer)) or (grouped and not block_of(name))
    ]
    if odd:
        raise ConfigurationError(
            f"No checkpoint holds {len(odd)} of the {len(layers)} layers in this format, {odd[0]} among them: "
            f"{layers[odd[0]].module}. Choose ranks only, with `format='bitsandbytes'` and `bits=[4]`, or plan another "
            "model."
        )


def check_possible(layers: Mapping[str, Layer], choices: Sequence[Choice]) -> None:
    """Raise a `ConfigurationError` unless every layer can become one of the choices."""
    stuck = [name for name, layer in layers.items() if not any(choice.is_possible(layer) for choice in choices)]
    if stuck:
        rows, columns = layers[stuck[0]].shape
        raise ConfigurationError(
            f"None of the choices is possible for {len(stuck)} of the {len(layers)} layers, {stuck[0]} among them: it "
            f"has {rows} x {columns} weights. A rank is at most the smaller side, and AutoGPTQ's format needs sides of "
            "a multiple of 16 for 2 bits, 32 for 3, 8 for 4 and 4 for 8. Add lower ranks, other bits, or 16 bits, "
            "which leave such a layer as it is."
        )


def reference_for(run: RunPlan, choices: Sequence[Choice], budget: Budget | None) -> Choice:
    """Return the choice for the network that layers are measured in: the largest base within the budget, and its rank.

    Args:
        run: the model.
        choices: the choices.
        budget: the budget; None for a plan of some quality, which is measured around 4 bits.

    Raises:
        ConfigurationError: if no plan stays within the budget.
    """
    quantized = [choice for choice in choices if choice.quantizer is not None]
    if budget is None:
        return min(quantized, key=lambda choice: (abs(choice.bits - 4), choice.rank))
    # Bytes follow from shapes, so a budget that nothing fits is refused before a weight is read.
    layers = run.adapter.layers
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    others = layers_besides(run, Question(tuple(choices), quantized[0]), run.empty)
    allowed = budget.nbytes(weights, other_bytes(run.empty, layers, others, choices))
    totals = {choice: sum(choice.nbytes(layer) for layer in layers.values()) for choice in quantized}
    least = min(totals.values())
    if least > allowed:
        raise ConfigurationError(
            f"The smallest choice takes {8 * least / weights:.2f} bits a weight, or {size(least)}, and the budget "
            f"{budget.text} leaves {size(max(0, int(allowed)))} for the layers. Raise it, or give fewer bits or lower "
            "ranks to choose from."
        )
    # The base comes first: few bits with a high rank leave more errors than the same bytes spent on another bit.
    fitting = [choice for choice in quantized if totals[choice] <= allowed]
    bases: dict[Quantizer | None, int] = {
        one: sum(Choice(one).nbytes(layer) for layer in layers.values()) for one in quantizers_of(fitting)
    }
    return max(fitting, key=lambda choice: (bases[choice.quantizer], choice.rank))
