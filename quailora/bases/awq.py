"""Layers of checkpoints in AutoAWQ's format (Lin et al., 2023, arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.grid import Grid, GridWeight
from ..quantizers.packing import unpack_words
from .checks import check_present, check_scales, check_words, misfit

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word of eight codes each output's is."""


def read_awq(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> GridWeight:
    """Return the weight of a layer.

    Args:
        tensors: `qweight`, `qzeros` and `scales`; codes and zero points run along the outputs, interleaved.
        config: the checkpoint's `quantization_config`.
        dtype: the dtype that the layer computes in.

    Raises:
        ModelError: if the checkpoint has other than 4 bits, is of another layout, a tensor is missing or damaged, or
            shapes do not fit together.
    """
    bits, layout = config.get("bits", 4), str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != 4 or layout != "gemm":
        raise ModelError(f"Expected an AWQ checkpoint of 4 bits in the layout 'gemm', got {bits} bits in {layout!r}.")
    check_present(tensors, ("qweight", "qzeros", "scales"))
    check_words(tensors, ("qweight", "qzeros"), (torch.int32,))
    check_scales(tensors, ("scales",))
    columns, (groups, rows) = len(tensors["qweight"]), tensors["qzeros"].shape
    rows *= 8
    fits = tensors["qweight"].shape[1] * 8 == rows and tensors["scales"].shape == (groups, rows)
    if not fits or groups == 0 or columns % groups:
        raise misfit(tensors, "one layer")
    grid = Grid(tensors["scales"].T.float(), codes_of(tensors["qzeros"]).T.float(), bits)
    codes = codes_of(tensors["qweight"]).T
    return GridWeight.store(codes, grid, group_size=columns // groups, dtype=dtype)


def codes_of(words: Tensor) -> Tensor:
    """Return codes in the order of the outputs, shape (rows of words, outputs)."""
    # AutoAWQ's kernels read the even outputs of a word first. `ORDER[i]` is the place of output i among the eight
    # codes.
    eights = unpack_words(words, 4).view(len(words), -1, 8)
    return eights[:, :, list(ORDER)].flatten(1)
