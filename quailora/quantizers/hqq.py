"""Half-quadratic quantization through the hqq package (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import ConfigurationError, NumericalError
from ..statistics import InputStatistics
from .base import QuantizedWeight, Quantizer
from .grid import join_groups, split_groups
from .packing import pack, unpack


@final
@dataclass(frozen=True, eq=False)
class HQQWeight(QuantizedWeight):
    """Levels `scale * (code - zero_point)`, where the zero point is a float16 number that need not be whole.

    Attributes:
        codes: packed codes, row-major, the last group of a row filled up.
        scale: float16.
        zero_point: float16.
        bits: width of a code.
        group_size: columns that share a scale.
        columns: `in_features`.
        dtype: dtype of the weight that was quantized.
    """

    codes: UInt8[Tensor, " packed"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    bits: int
    group_size: int
    columns: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return len(self.scale), self.columns

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:  # noqa: D102
        codes = unpack(self.codes, self.bits, (*self.scale.shape, self.group_size)).float()
        levels = (codes - self.zero_point.float()[..., None]) * self.scale.float()[..., None]
        return join_groups(levels, self.columns).to(self.dtype)


@final
@dataclass(frozen=True)
class HQQ(Quantizer):
    """1 to 8 bits: scales and zero points that a robust norm of the weight's error asks for, without calibration.

    Needs the package hqq. Groups along the inputs (`axis=1`), as its layers and PEFT use them. Not idempotent.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale.
    """

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = 4
    group_size: int = 64

    def encode(  # noqa: D102
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> HQQWeight:
        del statistics
        try:
            from hqq.core.quantize import Quantizer as Backend
        except ImportError as error:
            raise ConfigurationError(f"HQQ needs the package hqq ({error}): pip install 'quailora[hqq]'.") from error
        grouped = split_groups(weight.float(), self.group_size)
        codes, found = Backend.quantize(
            grouped.flatten(0, 1),
            nbits=self.bits,
            group_size=self.group_size,
            axis=1,
            round_zero=self.bits == 4,  # as its own configuration has it
            bitpack=False,
            device=weight.device.type,
        )
        scale, zero_point = (found[name].half().view(grouped.shape[:2]) for name in ("scale", "zero"))
        if not bool(scale.isfinite().all() and zero_point.isfinite().all()):
            raise NumericalError("Expected scales and zero points that fit float16; a group of weights is far from zero.")
        packed = pack(codes.to(torch.uint8), self.bits)
        return HQQWeight(packed, scale, zero_point, self.bits, self.group_size, weight.shape[1], weight.dtype)

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None
