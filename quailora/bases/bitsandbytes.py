"""Layers of checkpoints that transformers saved from bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantizers.fourbit import FourBitWeight
from ..quantizers.int8 import Int8Weight


def read_bitsandbytes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> FourBitWeight | Int8Weight:
    """Return the weight of a layer.

    Args:
        tensors: `weight` and `SCB` of an 8-bit layer; of a 4-bit one `weight` and its state, `weight.absmax` and so on.
        config: the checkpoint's `quantization_config`; the tensors say all.
        dtype: that the layer computes in.
    """
    del config
    if "SCB" in tensors:
        return Int8Weight(tensors["weight"], tensors["SCB"], dtype)
    from bitsandbytes.functional import QuantState

    prefix = "weight."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return FourBitWeight(tensors["weight"], QuantState.from_dict(state, tensors["weight"].device), dtype)
