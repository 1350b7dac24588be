"""The row-wise 8-bit weights of torchao."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from ..core.statistics import InputStatistics
from ..errors import ConfigurationError
from .base import QuantizedWeight, Quantizer


@final
@dataclass(frozen=True, eq=False)
class TorchaoWeight(QuantizedWeight):
    """One signed byte for each weight, and one scale for each row or group of columns, as in torchao's `Int8Tensor`.

    Attributes:
        codes: signed 8-bit codes.
        scale: scale of each group of a row, in the dtype of the weight.
        dtype: dtype of the weight that was quantized.
    """

    layout: ClassVar[str] = "torchao"

    codes: Int8[Tensor, "out_features in_features"]
    scale: Float[Tensor, "out_features groups"]
    dtype: torch.dtype

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        grouped = self.codes.view(*self.scale.shape, -1).to(self.scale.dtype)
        return (grouped * self.scale[:, :, None]).flatten(1).to(self.dtype)


@final
@dataclass(frozen=True)
class TorchaoInt8(Quantizer):
    """8 bits: nearest of 255 levels, scaled by each row's largest magnitude, as `Int8WeightOnlyConfig` does.

    Needs the package torchao. Unlike bitsandbytes' `Int8`, weights are not rounded to float16 first, and inputs stay as
    they are.
    """

    name: ClassVar[str] = "torchao_int8"

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> TorchaoWeight:
        del statistics
        logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels for other devices that it cannot load
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ConfigurationError(
                f"TorchaoInt8 needs the package torchao ({error}): pip install 'quailora[torchao]'."
            ) from error
        columns = weight.shape[1]
        working = weight.float() if weight.dtype == torch.float64 else weight  # it knows no float64
        padded = functional.pad(working, (0, int(columns == 1)))  # it takes a single column for one scale in all
        module = nn.Linear(padded.shape[1], len(padded), bias=False, device="meta")
        module.weight = nn.Parameter(padded, requires_grad=False)
        quantize_(module, Int8WeightOnlyConfig())
        stored: Any = module.weight
        return TorchaoWeight(stored.qdata[:, :columns].contiguous(), stored.scale, weight.dtype)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None
