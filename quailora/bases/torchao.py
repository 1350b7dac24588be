"""Layers of checkpoints that transformers saved from torchao's 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..quantizers.torchao_int8 import TorchaoWeight


def read_torchao(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> TorchaoWeight:
    """Return the weight of a layer.

    Args:
        tensors: `_weight_qdata`, `_weight_scale` and maybe `_weight_zero_point`.
        config: the checkpoint's `quantization_config`; the tensors say all.
        dtype: that the layer computes in.

    Raises:
        ModelError: if codes are no signed bytes around zero, which is all that is read.
    """
    del config
    codes, scale = tensors["_weight_qdata"], tensors.get("_weight_scale")
    zero_point = tensors.get("_weight_zero_point")
    if codes.dtype != torch.int8 or scale is None or (zero_point is not None and zero_point.any()):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ModelError(f"Expected torchao's int8 weights with zero points of zero, got {found}.")
    return TorchaoWeight(codes, scale, dtype)
