"""Quantized weights from the tensors of a checkpoint of one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..quantizers import QuantizedWeight
from .reader import READERS
from .writer import quantization_config


def unpacked(packed: Mapping[str, Tensor], dtype: torch.dtype) -> QuantizedWeight:
    """Return the quantized weight that the tensors of a checkpoint hold, as `QuantizedWeight.packed` returns them."""
    # What a reader takes from the configuration of a checkpoint follows from the tensors of one layer.
    config = quantization_config({"": packed})
    if "qweight" in packed:
        config["checkpoint_format"] = "gptq_v2"  # zero points as they are
    return READERS[config["quant_method"]](packed, config, dtype)
