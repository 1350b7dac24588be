"""Layers of checkpoints that hqq saved as safetensors (https://github.com/mobiusml/hqq)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.hqq import HQQWeight
from ..quantizers.packing import pack

_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Bits of a code and codes in a word."""


def read_hqq(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> HQQWeight:
    """Return the weight of a layer.

    Args:
        tensors: `W_q`, `scale`, `zero`, and as tensors what describes them: `shape`, `axis`, `packing` and so on.
        config: the checkpoint's `quantization_config`; the tensors say all.
        dtype: that the layer computes in.

    Raises:
        ModelError: if the layer is packed in another way, or its scales are quantized, too.
    """
    del config
    packing = "".join(map(chr, tensors["packing"].tolist())) if "packing" in tensors else "none"
    if packing not in _PACKINGS or not {"scale", "zero", "shape"} <= tensors.keys():
        raise ModelError(
            f"Expected a layer of hqq packed as one of {', '.join(_PACKINGS)}, with scales and zero points that are "
            f"not quantized, got packing {packing} and {', '.join(sorted(tensors))}."
        )
    bits, places = _PACKINGS[packing]
    words = tensors["W_q"]
    if words.is_floating_point():  # so it is held for FSDP; the bytes are the same
        words = words.view(torch.int32 if packing.endswith("32") else torch.uint8)
    rows, columns = tensors["shape"].tolist()
    # The first rows of the matrix of codes are the highest bits of all words, and so on.
    parts = [words >> bits * place & 2**bits - 1 for place in reversed(range(places))]
    codes = torch.cat(parts)[: rows * columns // words.shape[1]].to(torch.uint8)
    scale, zero_point = (each if each.ndim else each.view(1, 1) for each in (tensors["scale"], tensors["zero"]))
    matrix = (codes.shape[0], codes.shape[1])
    return HQQWeight(pack(codes, bits), scale, zero_point, bits, matrix, (rows, columns), dtype)
