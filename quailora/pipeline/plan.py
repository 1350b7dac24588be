"""What a run is asked for, made out and checked before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ..adapters.lora import LoraScaling
from ..bases import Prequantized
from ..calibration.walk import InputsOf
from ..calibration.windows import Calibration
from ..errors import ConfigurationError, TargetError
from ..layer.initializer import Initializer
from ..methods.method import Method
from ..methods.recipes import find_recipe
from ..models.layers import Layer, base_layers, kind
from ..quantizers import NF4, Quantizer
from ..solvers import AlternatingLeastSquares

logger = logging.getLogger("quailora")


def base_given(base: str, asked: Quantizer) -> Quantizer:
    """Return what gives the weights of a base that is there already.

    Raises:
        ConfigurationError: if a quantizer was asked for, too.
    """
    if asked != NF4():
        raise ConfigurationError("With --base the weights are quantized already; leave out --quantizer.")
    return Prequantized(base)


def method_of(
    recipe: str | None, asked: Initializer, scaling: LoraScaling, inputs: InputsOf
) -> tuple[Method, InputsOf, bool]:
    """Return the method, the inputs that it looks at, and whether it chooses a base of its own.

    Args:
        recipe: its name, if solver, metric and inputs are to be those of a recipe.
        asked: what was asked for.
        scaling: ranks and alphas.
        inputs: likewise.

    Raises:
        ConfigurationError: if options were given that a recipe decides.
    """
    if recipe is None:
        return Method(asked, scaling), inputs, False
    if (asked.solver, asked.metric, inputs) != (AlternatingLeastSquares(), "gram", "full"):
        raise ConfigurationError("A recipe decides solver, metric and inputs; leave these options out.")
    row = find_recipe(recipe)
    return row.method(asked.quantizer, scaling), row.inputs, row.changes_base


def check_layers(layers: Mapping[str, Layer], method: Method, source: Calibration, save_base: bool) -> None:
    """Raise a `ConfigurationError` or a `TargetError` if layers cannot be initialized so; warn of few tokens.

    Whether they are large enough for their ranks was checked when they were chosen.

    Args:
        layers: the targets.
        method: how they are quantized and corrected.
        source: what they are calibrated on.
        save_base: whether the base is to be written.
    """
    check_base(layers, method, save_base)
    check_tokens(layers, source)


def check_base(layers: Mapping[str, Layer], method: Method, save_base: bool) -> None:
    """Raise a `ConfigurationError` or a `TargetError` if layers are to be corrected that their base does not quantize.

    Args:
        layers: the targets.
        method: how they are quantized and corrected.
        save_base: whether the base is to be written.
    """
    quantizer = method.initializer.quantizer
    if isinstance(quantizer, Prequantized):
        if save_base:
            raise ConfigurationError(
                "With --base the base is there already: no --save-base, and no recipe that makes one."
            )
        quantizer.check(layers)
    if not save_base and any(layer.expert is not None for layer in layers.values()):
        raise ConfigurationError(
            "Stock transformers leaves fused experts in full precision when it quantizes a model, so there would be "
            "nothing to correct. Pass --save-base for a base with quantized experts, or leave experts out of --targets."
        )


def check_trainable(method: Method, layers: Mapping[str, Layer], on_disk: bool) -> None:
    """Raise a `ConfigurationError` if a method needs gradients of the whole model and cannot have them."""
    needed = method.polish is not None or method.initializer.metric == "fisher"
    if needed and (on_disk or any(layer.expert is not None for layer in layers.values())):
        raise ConfigurationError(
            "This method takes gradients of the whole model, which has to fit into memory and to have no fused experts "
            "among its targets. Take another recipe, such as best."
        )


def check_scaling(layers: Mapping[str, Layer], scaling: LoraScaling) -> None:
    """Raise a `TargetError` that lists the layers too small for their rank, or names a pattern that means no layer."""
    unused = scaling.unused_patterns({layer.group for layer in layers.values()})
    if unused:
        raise TargetError(
            f"The pattern {unused[0]!r} means none of the {len(layers)} target layers, the first of which is "
            f"{next(iter(layers))}. Patterns are names, endings at a dot, or regular expressions for an ending."
        )
    limits = {layer.group: min(layer.shape) for layer in layers.values()}
    small = {group: limit for group, limit in limits.items() if scaling.rank_of(group) > limit}
    if small:
        shown = ", ".join(f"{group} (at most {limit})" for group, limit in list(small.items())[:5])
        ranks = {
            kind(group): min(each for other, each in small.items() if kind(other) == kind(group)) for group in small
        }
        raise TargetError(
            f"{len(small)} of {len(limits)} layers cannot carry the rank they were given: {shown}"
            f"{', ...' if len(small) > 5 else ''}. Lower the rank, or give these layers their own: "
            f"--rank-pattern '{json.dumps(ranks)}'."
        )


def check_tokens(layers: Mapping[str, Layer], source: Calibration) -> None:
    """Warn if there are fewer calibration tokens than inputs of the widest layer.

    The second moment of its inputs is then singular: a correction can be perfect on the calibration text and poor on
    any other.
    """
    widest = max(layers.values(), key=lambda layer: layer.shape[1])
    tokens = source.samples * source.sequence_length
    if tokens < widest.shape[1]:
        logger.warning(
            "Calibrating on %d tokens, fewer than the %d inputs of %s: the errors that are reported will be too low "
            "for other text. Use more or longer samples.",
            tokens,
            widest.shape[1],
            widest.name,
        )


def quantized_layers(model: Any, chosen: Mapping[str, Layer], quantizer: Quantizer) -> dict[str, Layer]:
    """Return every layer that the base of a model has in quantized form, chosen or not."""
    layers = base_layers(model, chosen)
    return quantizer.among(layers) if isinstance(quantizer, Prequantized) else layers
