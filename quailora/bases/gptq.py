"""Layers of checkpoints in AutoGPTQ's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.grid import STOCK_BITS, Grid, GridWeight
from ..quantizers.groups import consecutive_groups
from ..quantizers.packing import unpack_words
from .checks import check_present, check_scales, check_words, described, misfit


def read_gptq(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> GridWeight:
    """Return the weight of a layer.

    Args:
        tensors: `qweight`, `qzeros`, `scales`, and `g_idx`, which only checkpoints without `desc_act` may lack. In
            format "gptq" zero points are stored less one, in "gptq_v2" as they are.
        config: the checkpoint's `quantization_config`.
        dtype: the dtype that the layer computes in.

    Raises:
        ModelError: if a tensor is missing or damaged, or the shapes do not fit together.
    """
    needed = ("qweight", "qzeros", "scales")
    check_present(tensors, (*needed, "g_idx") if config.get("desc_act") else needed)
    check_words(tensors, ("qweight", "qzeros"), (torch.int32,))
    check_scales(tensors, ("scales",))
    groups, rows = tensors["scales"].shape if tensors["scales"].ndim == 2 else (0, 0)
    bits = 32 * tensors["qzeros"].shape[1] // max(1, rows)  # by layer: gptqmodel's `dynamic` gives some their own
    fits = tensors["qzeros"].shape == (groups, rows * bits // 32) and tensors["qweight"].shape[1] == rows
    if bits not in STOCK_BITS or not fits:
        raise misfit(tensors, "one layer with 2, 3, 4 or 8 bits")
    columns = 32 * len(tensors["qweight"]) // bits
    group_index = tensors.get("g_idx")
    if group_index is not None:
        check_group_index(group_index, columns, groups)
    # The first version of the format stores zero points less one, so that zero becomes the largest code: undone modulo
    # 2^bits.
    zero_point = unpack_words(tensors["qzeros"], bits).T.float()
    if (config.get("checkpoint_format") or config.get("format") or "gptq") == "gptq":
        zero_point = (zero_point + 1) % 2**bits
    return GridWeight.store(
        unpack_words(tensors["qweight"].T, bits),
        Grid(tensors["scales"].T.float(), zero_point, bits),
        group_size=own_group_size(group_index) or group_size_of(tensors, config, columns, groups),
        dtype=dtype,
        group_index=group_index,
    )


def group_size_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], columns: int, groups: int) -> int:
    """Return how many columns share a scale: as configured, or in equal shares where a layer has its own size."""
    size = config.get("group_size")
    if isinstance(size, int) and size > 0 and math.ceil(columns / size) == groups:
        return size
    if groups == 0 or columns % groups:
        raise misfit(tensors, f"one layer in groups of {size}")
    return columns // groups


def own_group_size(group_index: Tensor | None) -> int | None:
    """Return how many columns share a scale in a layer of several groups of consecutive columns; None for any other."""
    if group_index is None or not group_index.any():
        return None
    size = int(group_index.bincount().max())
    implied = consecutive_groups(len(group_index), size, group_index.device)
    return size if torch.equal(group_index, implied.to(group_index.dtype)) else None


def check_group_index(group_index: Tensor, columns: int, groups: int) -> None:
    """Raise a `ModelError` unless each column has a group that exists."""
    if group_index.shape != (columns,) or group_index.is_floating_point():
        raise ModelError(
            f"Expected g_idx to have the group of each of {columns} columns, got {described(group_index)}."
        )
    if bool((group_index < 0).any()) or bool((group_index >= groups).any()):
        low, high = int(group_index.min()), int(group_index.max())
        raise ModelError(f"Expected groups below {groups} in g_idx, got {low} to {high}.")
