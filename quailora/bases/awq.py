"""Layers of checkpoints in AutoAWQ's format (Lin et al., 2023, arXiv 2306.00978), read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, ModelError
from ..quantizers.grid import Grid, GridWeight
from ..quantizers.groups import consecutive_groups
from ..quantizers.packing import pack_words, unpack_words
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


def awq_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer in AutoAWQ's format; codes, scales and zero points stay what they are.

    Args:
        tensors: the same layer in AutoGPTQ's format, zero points as they are, see `GridWeight.packed`.

    Raises:
        ConfigurationError: if the codes have other than 4 bits, or groups are not runs of columns of one length.
    """
    groups, rows = tensors["scales"].shape
    columns, bits = len(tensors["g_idx"]), 32 * tensors["qzeros"].shape[1] // rows
    index, size = tensors["g_idx"].long(), -(-columns // groups)
    if bits != 4 or columns % groups or not torch.equal(index, consecutive_groups(columns, size, index.device)):
        raise ConfigurationError(
            f"AutoAWQ's format holds codes of 4 bits in groups of consecutive columns, all of one size, got {bits} "
            f"bits and {groups} groups of {columns} columns. Take another `base_format`, or a quantizer with such "
            "groups."
        )
    return {
        "qweight": words_of(unpack_words(tensors["qweight"].T, bits).T),
        "qzeros": words_of(unpack_words(tensors["qzeros"], bits)),
        "scales": tensors["scales"],
    }


def awq_config(packed: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint in AutoAWQ's format.

    Args:
        packed: tensors of each layer in AutoGPTQ's format.

    Raises:
        ConfigurationError: if layers differ in the size of their groups.
    """
    sizes = {len(tensors["g_idx"]) // len(tensors["scales"]) for tensors in packed.values()}
    whole = all(len(tensors["scales"]) == 1 for tensors in packed.values())
    if len(sizes) > 1 and not whole:
        raise ConfigurationError(
            f"AutoAWQ's format has one group size for all layers, got {', '.join(map(str, sorted(sizes)))}. Take "
            "another `base_format`."
        )
    size = -1 if whole else sizes.pop()
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}


def words_of(codes: Tensor) -> Tensor:
    """Pack codes of shape (rows of words, outputs); the inverse of `codes_of`."""
    place = torch.tensor(ORDER).argsort()
    return pack_words(codes.reshape(len(codes), -1, 8)[:, :, place].flatten(1), 4).contiguous()


def codes_of(words: Tensor) -> Tensor:
    """Return codes in the order of the outputs, shape (rows of words, outputs)."""
    # AutoAWQ's kernels read the even outputs of a word first. `ORDER[i]` is the place of output i among the eight
    # codes.
    eights = unpack_words(words, 4).view(len(words), -1, 8)
    return eights[:, :, list(ORDER)].flatten(1)
