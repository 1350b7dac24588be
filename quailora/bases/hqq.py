"""Layers of checkpoints that hqq saved as safetensors (https://github.com/mobiusml/hqq)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.hqq import HQQWeight
from ..quantizers.packing import pack
from .checks import check_present, check_scales, described, misfit

_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Bits of a code and codes in a word."""


def read_hqq(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> HQQWeight:
    """Return the weight of a layer.

    Args:
        tensors: `W_q`, `scale`, `zero`, and as tensors what describes them: `shape`, `axis`, `packing` and so on.
        config: the checkpoint's `quantization_config`; it is ignored, since the tensors describe themselves.
        dtype: the dtype that the layer computes in.

    Raises:
        ModelError: if the layer is packed in another way, its scales are quantized, too, a tensor is missing or
            damaged, or the shapes do not fit together.
    """
    del config
    check_present(tensors, ("W_q", "shape"))
    packing = "".join(chr(each) for each in numbers_of(tensors.get("packing"))) or "none"
    if packing not in _PACKINGS or not {"scale", "zero"} <= tensors.keys():
        raise ModelError(
            f"Expected a layer of hqq packed as one of {', '.join(_PACKINGS)}, with scales and zero points that are "
            f"not quantized, got packing {packing} and {', '.join(sorted(tensors))}."
        )
    check_scales(tensors, ("scale", "zero"))
    bits, codes_in_word = _PACKINGS[packing]
    words = words_of(tensors["W_q"], torch.int32 if packing.endswith("32") else torch.uint8)
    size = numbers_of(tensors["shape"])
    if len(size) != 2 or min(size) < 1:
        raise ModelError(f"Expected the shape of a matrix in shape, got {described(tensors['shape'])}.")
    rows, columns = size
    # The first rows of the matrix of codes are the highest bits of all words, and so on.
    parts = [words >> bits * position & 2**bits - 1 for position in reversed(range(codes_in_word))]
    codes = torch.cat(parts)[: rows * columns // words.shape[1]].to(torch.uint8)
    scale, zero_point = (each if each.ndim else each.view(1, 1) for each in (tensors["scale"], tensors["zero"]))
    matrix = (codes.shape[0], codes.shape[1])
    groups = {(matrix[0], 1), (1, matrix[1]), (1, 1)}
    filled = len(words) == -(-matrix[0] // codes_in_word)
    if (
        not filled
        or math.prod(matrix) != rows * columns
        or scale.shape != zero_point.shape
        or tuple(scale.shape) not in groups
    ):
        raise misfit(tensors, f"a matrix of {rows} x {columns} in {bits} bits")
    return HQQWeight(pack(codes, bits), scale, zero_point, bits, matrix, (rows, columns), dtype)


def numbers_of(stored: Tensor | None) -> list[int]:
    """Return the natural numbers that a tensor holds; none if it holds anything else, or is not there."""
    if stored is None or stored.is_floating_point() or bool((stored < 0).any()):
        return []
    return [int(each) for each in stored.flatten().tolist()]


def words_of(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return packed codes as integers; for FSDP they are held as floating-point numbers with the same bytes.

    Raises:
        ModelError: if they are no matrix of such words.
    """
    words = stored.view(dtype) if stored.is_floating_point() and stored.ndim else stored
    if words.dtype != dtype or words.ndim != 2 or 0 in words.shape:
        raise ModelError(f"Expected codes in W_q, a matrix of {dtype}, got {described(stored)}.")
    return words
