"""Half-quadratic quantization through the hqq package (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from ..core.statistics import InputStatistics
from ..errors import ConfigurationError, NumericalError, check_choice
from .base import QuantizedWeight, Quantizer
from .groups import check_group_size, split_groups
from .packing import pack, unpack


@final
@dataclass(frozen=True, eq=False)
class HQQWeight(QuantizedWeight):
    """Levels `scale * (code - zero_point)`, where the zero point is a number that need not be whole.

    Codes form a matrix whose rows or columns are groups; its entries, row by row, are those of the weight.

    Attributes:
        codes: packed codes, row by row of their matrix.
        scale: scale of each row, or of each column, of the matrix of codes.
        zero_point: zero point of each row, or of each column, of the matrix of codes.
        bits: width of a code.
        matrix: shape of the matrix of codes.
        size: shape of the weight; where its columns do not fill their last group, rows have padding at the end.
        dtype: dtype of the weight that was quantized.
    """

    layout: ClassVar[str] = "hqq"

    codes: UInt8[Tensor, " packed"]
    scale: Float[Tensor, "rows columns"]
    zero_point: Float[Tensor, "rows columns"]
    bits: int
    matrix: tuple[int, int]
    size: tuple[int, int]
    dtype: torch.dtype

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.size

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        codes = unpack(self.codes, self.bits, self.matrix).float()
        levels = (codes - self.zero_point.float()) * self.scale.float()
        return levels.view(self.size[0], -1)[:, : self.size[1]].to(self.dtype)


@final
@dataclass(frozen=True)
class HQQ(Quantizer):
    """1 to 8 bits: scales and zero points minimise a robust norm of the weight's error, without calibration.

    Needs the package hqq. The search runs on the CPU in float32, because on a GPU the package searches in float16 and
    finds other values. Groups run along the inputs (`axis=1`), as hqq's layers and PEFT use them. It is not idempotent.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale.
    """

    name: ClassVar[str] = "hqq"

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        check_choice("a number of bits", self.bits, (1, 2, 3, 4, 5, 6, 8))
        check_group_size(self.group_size)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> HQQWeight:
        del statistics
        try:
            from hqq.core.quantize import Quantizer as Backend
        except ImportError as error:
            raise ConfigurationError(f"HQQ needs the package hqq ({error}): pip install 'quailora[hqq]'.") from error
        groups = split_groups(weight.float(), self.group_size).flatten(0, 1)
        codes, parameters = Backend.quantize(
            groups.cpu(),
            nbits=self.bits,
            group_size=self.group_size,
            axis=1,
            round_zero=self.bits == 4,  # as its own configuration has it
            bitpack=False,
            device="cpu",
        )
        codes = codes.to(weight.device)
        scale, zero_point = (parameters[name].half().view(-1, 1).to(weight.device) for name in ("scale", "zero"))
        if not bool(scale.isfinite().all() and zero_point.isfinite().all()):
            raise NumericalError(
                "Expected scales and zero points that fit float16; a group of weights is far from zero."
            )
        packed = pack(codes.to(torch.uint8), self.bits)
        matrix, size = (len(groups), self.group_size), (weight.shape[0], weight.shape[1])
        return HQQWeight(packed, scale, zero_point, self.bits, matrix, size, weight.dtype)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None
