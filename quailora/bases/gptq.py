"""Layers of checkpoints in AutoGPTQ's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantizers.grid import STOCK_BITS, Grid, GridWeight
from ..quantizers.packing import unpack_words
from .misfit import misfit


def read_gptq(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> GridWeight:
    """Return the weight of a layer.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and maybe `g_idx`. In format "gptq" zero points are stored less one, in
            "gptq_v2" as they are.
        config: the checkpoint's `quantization_config`.
        dtype: that the layer computes in.

    Raises:
        ModelError: if the shapes do not fit together.
    """
    groups, rows = tensors["scales"].shape
    bits = 32 * tensors["qzeros"].shape[-1] // rows  # by layer: gptqmodel's `dynamic` gives some layers their own
    fits = tensors["qzeros"].shape == (groups, rows * bits // 32) and tensors["qweight"].shape[-1] == rows
    if bits not in STOCK_BITS or not fits:
        raise misfit(tensors, "one layer with 2, 3, 4 or 8 bits")
    columns, group_size = 32 * len(tensors["qweight"]) // bits, int(config["group_size"])
    if group_size <= 0 or math.ceil(columns / group_size) != groups:
        group_size = columns // groups
    codes = unpack_words(tensors["qweight"].T, bits)
    zero_point = unpack_words(tensors["qzeros"], bits).T.float()
    if (config.get("checkpoint_format") or config.get("format") or "gptq") == "gptq":
        zero_point = (zero_point + 1) % 2**bits
    return GridWeight.store(
        codes,
        Grid(tensors["scales"].T.float(), zero_point, bits),
        group_size=group_size,
        dtype=dtype,
        group_index=tensors.get("g_idx"),
    )
