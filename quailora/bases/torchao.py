"""Layers of checkpoints that transformers saved from torchao's 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.torchao_int8 import TorchaoWeight
from .checks import check_present, check_scales, check_words, misfit


def read_torchao(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> TorchaoWeight:
    """Return the weight of a layer.

    Args:
        tensors: `_weight_qdata`, `_weight_scale` and maybe `_weight_zero_point`.
        config: the checkpoint's `quantization_config`; it is ignored, since the tensors describe themselves.
        dtype: the dtype that the layer computes in.

    Raises:
        ModelError: if codes are no signed bytes around zero, which is all that is read, a tensor is missing or damaged,
            or the shapes do not fit together.
    """
    del config
    check_present(tensors, ("_weight_qdata",))
    codes, zero_point = tensors["_weight_qdata"], tensors.get("_weight_zero_point")
    if codes.dtype != torch.int8 or (zero_point is not None and bool(zero_point.any())):
        stored = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ModelError(f"Expected torchao's int8 weights with zero points of zero, got {stored}.")
    check_present(tensors, ("_weight_qdata", "_weight_scale"))
    check_words(tensors, ("_weight_qdata",), (torch.int8,))
    check_scales(tensors, ("_weight_scale",))
    scale = tensors["_weight_scale"]
    fits = scale.ndim == 2 and len(scale) == len(codes)
    if not fits or scale.shape[1] == 0 or codes.shape[1] % scale.shape[1]:
        raise misfit(tensors, "one layer with scales for each row")
    return TorchaoWeight(codes, scale, dtype)
