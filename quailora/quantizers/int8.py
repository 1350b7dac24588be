"""The row-wise 8-bit weights of LLM.int8 through bitsandbytes (Dettmers et al., 2022, arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from jaxtyping import Int8 as Int8Array
from torch import Tensor
from typing_extensions import override

from ..core.statistics import InputStatistics
from ..errors import NumericalError
from .base import QuantizedWeight, Quantizer


@final
@dataclass(frozen=True, eq=False)
class Int8Weight(QuantizedWeight):
    """One signed byte for each weight, and one float32 scale for each row.

    Attributes:
        codes: signed 8-bit codes.
        absmax: largest magnitude of each row.
        dtype: dtype of the weight that was quantized.
    """

    layout: ClassVar[str] = "int8"

    codes: Int8Array[Tensor, "out_features in_features"]
    absmax: Float[Tensor, " out_features"]
    dtype: torch.dtype

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def packed(self) -> Mapping[str, Tensor]:
        """Return bitsandbytes' own tensors; the last one says that codes are stored row after row."""
        return {"weight": self.codes, "SCB": self.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight: Tensor = int8_vectorwise_dequant(self.codes, self.absmax)
        return weight.to(self.dtype)


@final
@dataclass(frozen=True)
class Int8(Quantizer):
    """8 bits: nearest of 255 levels, scaled by each row's largest magnitude.

    Equivalent to the weights of `BitsAndBytesConfig(load_in_8bit=True)`, which are rounded to float16 first. At run
    time that layer also quantizes its inputs to 8 bits, which no static adapter can undo and which is not modelled
    here. Idempotent.
    """

    name: ClassVar[str] = "int8"

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> Int8Weight:
        del statistics
        from bitsandbytes.functional import int8_vectorwise_quant

        # bitsandbytes' own layer rounds the weight to float16 before it hands it to this kernel.
        rounded = weight.to(torch.float16).contiguous()
        if not rounded.isfinite().all():
            raise NumericalError(
                f"bitsandbytes rounds weights to float16 before it makes 8 bits of them, which cannot hold a weight of "
                f"magnitude {weight.abs().max().item():.3g}."
            )
        codes, absmax, _ = int8_vectorwise_quant(rounded)
        return Int8Weight(codes, absmax, weight.dtype)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return {"load_in_8bit": True}
