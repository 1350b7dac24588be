"""Layers of checkpoints that transformers saved from bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError, first_line
from ..quantizers.fourbit import FourBitWeight
from ..quantizers.int8 import Int8Weight
from .checks import check_present, check_scales, check_words, misfit

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_STATE = "weight.quant_state.bitsandbytes__"
_PREFIX = "weight."
_CODE_LEVELS, _SCALE_LEVELS = 16, 256


def read_bitsandbytes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> FourBitWeight | Int8Weight:
    """Return the weight of a layer.

    Args:
        tensors: `weight` and `SCB` of an 8-bit layer; of a 4-bit one `weight` and its state, `weight.absmax` and so on.
            Codes of 4 bits are bytes in whatever dtype the checkpoint holds them.
        config: the checkpoint's `quantization_config`, which says of layers without their state what they should have.
        dtype: the dtype that the layer computes in.

    Raises:
        ModelError: if a tensor is missing or damaged, or the shapes do not fit together.
    """
    if "SCB" in tensors or config.get("load_in_8bit"):
        return read_eight_bit(tensors, dtype)
    kinds = [name.removeprefix(_STATE) for name in tensors if name.startswith(_STATE)]
    check_present(tensors, ("weight", "weight.absmax", "weight.quant_map", f"{_STATE}{kinds[0] if kinds else 'nf4'}"))
    nested = "weight.nested_absmax" in tensors or not tensors["weight.absmax"].is_floating_point()
    if nested:
        check_present(tensors, ("weight.nested_absmax", "weight.nested_quant_map"))
    check_scales(tensors, ("weight.quant_map", "weight.nested_quant_map"))
    check_scales(tensors, ("weight.nested_absmax",) if nested else ("weight.absmax",), negative=False)
    state = state_of(tensors)
    check_state(tensors, state)
    check_tables(state)
    codes = tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1)
    return FourBitWeight(codes, state, dtype)


def read_eight_bit(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Int8Weight:
    """Return the weight of a layer of 8 bits; see `read_bitsandbytes`."""
    check_present(tensors, ("weight", "SCB"))
    check_words(tensors, ("weight",), (torch.int8,))
    check_scales(tensors, ("SCB",), negative=False)
    if tensors["SCB"].shape != (len(tensors["weight"]),):
        raise misfit(tensors, "one layer of 8 bits with a scale for each row")
    if "weight_format" in tensors and bool(tensors["weight_format"].any()):
        raise ModelError(
            "Expected codes row after row, got a layout for the kernels of old GPUs. Save the checkpoint again with a "
            "current bitsandbytes."
        )
    return Int8Weight(tensors["weight"], tensors["SCB"], dtype)


def state_of(tensors: Mapping[str, Tensor]) -> QuantState:
    """Return bitsandbytes' own description of a layer of 4 bits.

    Raises:
        ModelError: if bitsandbytes cannot read it.
    """
    from bitsandbytes.functional import QuantState

    parts = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    try:
        return QuantState.from_dict(parts, tensors["weight"].device)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"Expected bitsandbytes' description of a layer of 4 bits, got one that it cannot read "
            f"({type(error).__name__}: {first_line(error)}). Download or copy the checkpoint again."
        ) from error


def check_state(tensors: Mapping[str, Tensor], state: QuantState) -> None:
    """Raise a `ModelError` unless codes, scales and tables have the sizes that the description asks for."""
    shape, sizes = tuple(state.shape or ()), [state.blocksize]
    if state.nested:
        sizes.append(state.state2.blocksize)
    whole = all(isinstance(size, int) and size > 0 for size in (*shape, *sizes))
    if not whole or len(shape) != 2:
        raise misfit(tensors, f"a matrix in blocks, but its description says {shape} in blocks of {sizes}")
    # Two codes to a byte, one scale to a block; of nested scales one more to each block of them. Codes may be held in a
    # longer dtype, where less than one element at the end can be padding.
    count = math.prod(shape)
    scales = -(-count // state.blocksize)
    stored = tensors["weight"].numel() * tensors["weight"].element_size()
    fits = stored >= -(-count // 2) and state.absmax.numel() == scales and state.code.numel() == _CODE_LEVELS
    fits = fits and stored - -(-count // 2) < tensors["weight"].element_size()
    if state.nested:
        fits = fits and state.state2.absmax.numel() == -(-scales // state.state2.blocksize)
        fits = fits and state.state2.code.numel() == _SCALE_LEVELS and state.absmax.dtype == torch.uint8
        fits = fits and bool(state.offset.isfinite())
    if not fits:
        raise misfit(tensors, f"a matrix of {shape[0]} x {shape[1]} in blocks of {state.blocksize}")


def check_tables(state: QuantState) -> None:
    """Raise a `ModelError` unless the values of codes and of 8-bit scales are those of bitsandbytes."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    tables = [("quant_map", state.code, get_4bit_type(state.quant_type, device="cpu"))]
    if state.nested:
        tables.append(("nested_quant_map", state.state2.code, create_dynamic_map()))
    for name, table, expected in tables:
        bad = int((~torch.isclose(table.cpu().float(), expected.float(), rtol=1e-5, atol=0.0)).sum())
        if bad:
            raise ModelError(
                f"Expected the values that bitsandbytes has for codes in weight.{name}, got {bad} others of "
                f"{len(expected)}. Download or copy the checkpoint again."
            )
