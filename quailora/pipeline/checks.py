"""Checks of a run before anything is loaded or computed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..adapters.frozen import check_frozen
from ..adapters.lora import LoraScaling
from ..bases.writer import is_replaced
from ..calibration.sources import CalibrationSource, TextCalibration
from ..errors import ConfigurationError, TargetError, named
from ..families import Family, Lora
from ..methods.block_training import ENOUGH_TOKENS
from ..methods.method import Method
from ..models.layers import Layer, block_of, kind
from ..quantizers import GPTQ, AutoGPTQ, QuantizedWeight
from ..quantizers.fourbit import FourBitWeight
from ..quantizers.grid import GridWeight
from ..support.choices import FactorsDtype
from ..support.files import StrPath, check_output, check_writable, folder_of
from ..support.inputs import check_inputs
from .formats import example_of

logger = logging.getLogger("quailora")

_SEEDS = 2**63


def check_seed(seed: int) -> None:
    """Raise a `ConfigurationError` unless PyTorch's generators take a seed and the one after it."""
    if not 0 <= seed < _SEEDS:
        raise ConfigurationError(f"Expected a seed from 0 to {_SEEDS - 1}, got {seed}. Try `seed=0`.")


def output_folder(out: StrPath, *, overwrite: bool, model: bool = False, inputs: Iterable[object] = ()) -> Path:
    """Return the folder that results go to.

    Args:
        out: the folder as the caller names it.
        overwrite: whether a result that is there may be replaced.
        model: whether a model is written, see `check_output`.
        inputs: what is read, see `check_inputs`.

    Raises:
        ConfigurationError, StorageError, OutputExistsError: if it cannot be made or must stay as it is.
    """
    folder = folder_of(out)
    check_writable(folder)
    check_output(folder, overwrite, model=model)
    check_inputs(folder, inputs, model=model)
    return folder


def check_layers(layers: Mapping[str, Layer], method: Method, source: CalibrationSource, save_base: bool) -> None:
    """Raise a `ConfigurationError` or a `TargetError` if layers cannot be initialized so; warn of few tokens.

    Whether they are large enough for their ranks was checked when they were chosen.

    Args:
        layers: the targets.
        method: how they are quantized and corrected.
        source: what they are calibrated on.
        save_base: whether the base is to be written.
    """
    check_quantized(layers, method, save_base)
    check_tokens(layers, source)


def check_layout(family: Family, layout: str) -> None:
    """Raise a `ConfigurationError` unless stock PEFT computes a family on layers of some layout.

    Args:
        family: the kind of adapter.
        layout: see `QuantizedWeight.layout`.
    """
    if layout not in family.bases:
        raise ConfigurationError(
            f"Stock PEFT cannot compute {family.title} on a base of the layout {layout}, or computes it "
            f"wrongly there; it does on {', '.join(sorted(family.bases))}. Take another family or quantizer, or write "
            "the base in floating point with `save_base=True` and `base_format='dequantized'`."
        )


def check_awq(layers: Mapping[str, Layer], method: Method, example: QuantizedWeight) -> None:
    """Raise a `ConfigurationError` unless a base can be written in AutoAWQ's format.

    Args:
        layers: the targets.
        method: how they are quantized.
        example: a weight that is quantized so.
    """
    quantizer = method.quantizer
    if isinstance(quantizer, (GPTQ, AutoGPTQ)) and quantizer.activation_order and not quantizer.static_groups:
        raise ConfigurationError(
            "AutoAWQ's format holds groups of consecutive columns, and `activation_order` makes others. Pass "
            "`static_groups`, too, which keeps them."
        )
    if method.kept:
        raise ConfigurationError(
            "This base keeps some layers in full precision, which is written in AutoGPTQ's format only. Leave out "
            "`base_format`."
        )
    if not isinstance(example, GridWeight) or example.bits != 4:
        raise ConfigurationError(
            "AutoAWQ's format holds uniform levels of 4 bits, as `GPTQ` and `Uniform` make them, got "
            f"{method.base.title if method.base else repr(quantizer)}. Leave out `base_format`, or take one of these."
        )
    # The example may be smaller than the layer, so that one group for all of its columns says nothing of the layer.
    size = example.group_size if example.group_size < example.columns else 1
    for name, layer in layers.items():
        rows, columns = layer.shape
        if not is_replaced(layer) or not block_of(name) or rows % 8 or columns % 8 or columns % size:
            raise ConfigurationError(
                f"AutoAWQ's format holds linear layers of blocks whose sides are multiples of 8 and whose inputs are "
                f"whole groups, and {name} is not such a layer: {layer.module}. Leave out `base_format`."
            )


def check_factors_dtype(family: Family, dtype: FactorsDtype) -> None:
    """Raise a `ConfigurationError` if an adapter cannot be stored in a dtype without a visible error."""
    if dtype != "float32" and family.needs_base:
        raise ConfigurationError(
            f"The adapter {family.title} multiplies the quantized weight, and rounding its numbers to "
            f"{dtype} would move the whole output. Leave out `factors_dtype`, or take a family that adds, such as lora."
        )


def check_quantized(layers: Mapping[str, Layer], method: Method, save_base: bool) -> None:
    """Raise a `ConfigurationError` or a `TargetError` if the base does not quantize a layer that is to be corrected.

    Args:
        layers: the targets.
        method: how they are quantized and corrected.
        save_base: whether the base is to be written.
    """
    if method.base is not None:
        if save_base and not method.base.writable:
            raise ConfigurationError(
                "With `base` the base is there already. Leave out `save_base`, or take a recipe that keeps the base."
            )
        method.base.check(layers)
    quantizer = method.quantizer
    if quantizer is not None and not save_base and quantizer.stock_config() is None:
        logger.warning(
            "Stock packages do not make the base of %r while they load a model, and it will not be written. Pass "
            "`save_base=True` to have it beside the adapter.",
            quantizer,
        )
    if not save_base and any(layer.expert is not None for layer in layers.values()):
        raise ConfigurationError(
            "Stock transformers leaves fused experts in full precision when it quantizes a model, so there would be "
            "nothing to correct. Pass `save_base=True` for a base with quantized experts, or leave experts out of "
            "`targets`."
        )


def warn_of_blocks(layers: Mapping[str, Layer], stored: QuantizedWeight) -> None:
    """Warn of layers that bitsandbytes computes wrongly on a CPU: 4-bit ones whose rows do not fill whole blocks.

    Args:
        layers: the targets.
        stored: an example of their format.
    """
    # Seen with bitsandbytes 0.50.2, whose kernel for CPUs begins a block with each row. Its kernel for GPUs is right.
    if not isinstance(stored, FourBitWeight):
        return
    size = stored.state.blocksize
    narrow = [name for name, layer in layers.items() if layer.shape[1] % size]
    if narrow:
        logger.warning(
            "On a CPU, bitsandbytes decodes 4-bit layers wrongly whose inputs are no multiple of %d: %d of %d, %s "
            "among them. Load the base on a GPU, or take another quantizer, such as int8.",
            size,
            len(narrow),
            len(layers),
            narrow[0],
        )


def check_gradients(method: Method, layers: Mapping[str, Layer], on_disk: bool) -> None:
    """Raise a `ConfigurationError` if a method needs gradients of the whole model and cannot have them."""
    if method.needs_gradients and (on_disk or any(layer.expert is not None for layer in layers.values())):
        raise ConfigurationError(
            "This method takes gradients of the whole model, which has to fit into memory and to have no fused experts "
            "among its targets. Take another recipe, such as best."
        )


def check_frozen_rank(method: Method, layers: Mapping[str, Layer]) -> None:
    """Raise a `ConfigurationError` unless directions are left beside those that are frozen, in every layer."""
    if method.frozen_rank is None:
        return
    check_frozen(method.frozen_rank, {each.group: method.scaling.rank_of(each.group) for each in layers.values()}, 1)
    if any(layer.expert is not None for layer in layers.values()):
        raise ConfigurationError(
            "Directions of fused experts cannot be frozen one by one. Leave `frozen_rank` or the experts out."
        )


def check_sizes(layers: Mapping[str, Layer], scaling: LoraScaling, family: Family) -> None:
    """Raise a `TargetError` that names the first layer which cannot carry an adapter of a family, and says why."""
    for layer in layers.values():
        with named(layer.name):
            family.shapes(layer.shape, scaling.rank_of(layer.group))
            if family.moves_bias and getattr(layer.module, "bias", None) is not None:
                raise TargetError(
                    f"This layer has a bias, which PEFT changes together with its weight in {family.title}, "
                    "and the fit does not see it. Leave such layers out of the targets, or take another family."
                )


def check_scaling(layers: Mapping[str, Layer], scaling: LoraScaling, family: Family = Lora()) -> None:  # noqa: B008
    """Raise a `TargetError` that lists the layers too small for their rank, or names a pattern that means no layer."""
    unused = scaling.unused_patterns({layer.group for layer in layers.values()})
    if unused:
        raise TargetError(
            f"The pattern {unused[0]!r} means none of the {len(layers)} target layers, the first of which is "
            f"{next(iter(layers))}. Patterns are names, endings at a dot, or regular expressions for an ending."
        )
    if family.name != "lora":
        check_sizes(layers, scaling, family)
        return
    # B A of rank r needs r independent rows and columns. A layer with fewer has no use for more.
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
            f"`rank_pattern={json.dumps(ranks)}`."
        )


def check_tokens(layers: Mapping[str, Layer], source: CalibrationSource) -> None:
    """Warn if there are fewer calibration tokens than inputs of the widest layer.

    The second moment of its inputs is then singular: a correction can be perfect on the calibration text and poor on
    any other.
    """
    # A second moment of n tokens has rank n at most: an input wider than that leaves directions without any data.
    widest = max(layers.values(), key=lambda layer: layer.shape[1])
    samples, length = source.size
    tokens = samples * length
    if tokens < widest.shape[1]:
        logger.warning(
            "Calibrating on %d tokens, fewer than the %d inputs of %s: the errors that are reported will be too low "
            "for other text. Use more or longer samples.",
            tokens,
            widest.shape[1],
            widest.name,
        )


def warn_of_shipped_text(source: CalibrationSource) -> None:
    """Warn if no text was given to calibrate on."""
    if isinstance(source, TextCalibration) and source.calibration.text.source is None:
        logger.warning("Calibrating on the text that ships with quailora; pass a text like that of your task.")


def warn_of_training(method: Method, source: CalibrationSource, layer: Layer) -> None:
    """Warn if blocks are to be trained on less text than makes them better on other text, or less of them than asked.

    Args:
        method: how layers are initialized.
        source: the calibration text.
        layer: a layer with a correction.
    """
    samples, length = source.size
    if method.trains_base and not example_of(method, layer).packed():
        logger.warning(
            "The base of %r stays as it is in the training of blocks, because checkpoints have no format for its codes "
            "and scales. Only corrections are trained.", method.quantizer,
        )  # fmt: skip
    if method.blocks is not None and samples * length < ENOUGH_TOKENS:
        logger.warning(
            "Blocks are trained on %d tokens at most, and a quarter of these is held out. On so few, most blocks stay "
            "as they are; calibrate on %d or more.", samples * length, ENOUGH_TOKENS,
        )  # fmt: skip
