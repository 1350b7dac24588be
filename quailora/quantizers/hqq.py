"""Half-quadratic quantization (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import NumericalError, check_choice
from ..statistics import InputStatistics
from .base import QuantizedWeight, Quantizer
from .grid import check_group_size, split_groups
from .packing import pack, unpack

_NARROW = 1e-4  # a group of a smaller range keeps its weights as they are, one step to one
_STEEP = 2e4  # largest number of steps to one
_ROUNDS, _NORM, _WEIGHT = 20, 0.7, 10.0  # rounds at most, power of the norm, weight of the quadratic term


@final
@dataclass(frozen=True, eq=False)
class HQQWeight(QuantizedWeight):
    """Levels `scale * (code - zero_point)`, where the zero point is a number that need not be whole.

    Codes form a matrix whose rows or columns are groups; its entries, row by row, are those of the weight.

    Attributes:
        codes: packed, row by row of their matrix.
        scale: of each row or of each column of that matrix.
        zero_point: likewise.
        bits: width of a code.
        matrix: shape of the matrix of codes.
        size: shape of the weight; where its columns do not fill their last group, rows have padding at the end.
        dtype: dtype of the weight that was quantized.
    """

    codes: UInt8[Tensor, " packed"]
    scale: Float[Tensor, "rows columns"]
    zero_point: Float[Tensor, "rows columns"]
    bits: int
    matrix: tuple[int, int]
    size: tuple[int, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.size

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:  # noqa: D102
        codes = unpack(self.codes, self.bits, self.matrix).float()
        levels = (codes - self.zero_point.float()) * self.scale.float()
        return levels.view(self.size[0], -1)[:, : self.size[1]].to(self.dtype)


@final
@dataclass(frozen=True)
class HQQ(Quantizer):
    """1 to 8 bits: scales and zero points that a robust norm of the weight's error asks for, without calibration.

    The same codes, scales and zero points as the package hqq finds on a CPU, where it works in float32. On a GPU that
    package works in float16 and finds others, so the method is written out here, and every device gives the same.
    Groups along the inputs (`axis=1`), as its layers and PEFT use them. Not idempotent.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale.
    """

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        check_choice("a number of bits", self.bits, (1, 2, 3, 4, 5, 6, 8))
        check_group_size(self.group_size)

    def encode(  # noqa: D102
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> HQQWeight:
        del statistics
        groups = split_groups(weight.float(), self.group_size).flatten(0, 1)
        codes, scale, zero_point = half_quadratic(groups, self.bits)
        scale, zero_point = scale.half(), zero_point.half()
        if not bool(scale.isfinite().all() and zero_point.isfinite().all()):
            raise NumericalError(
                "Expected scales and zero points that fit float16; a group of weights is far from zero."
            )
        packed = pack(codes.to(torch.uint8), self.bits)
        matrix, size = (len(groups), self.group_size), (weight.shape[0], weight.shape[1])
        return HQQWeight(packed, scale, zero_point, self.bits, matrix, size, weight.dtype)

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None


def half_quadratic(
    groups: Float[Tensor, "groups group"], bits: int
) -> tuple[Float[Tensor, "groups group"], Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """Return codes, scales and zero points of groups of weights.

    The scale spans the range of a group. The zero point `z` alternates with an error `e` that is shrunk as the `p`-norm
    of the error asks for, each the minimiser with the other fixed, until the mean error rises:

        codes = round(w / s + z),   e = shrink(w - s (codes - z)),   z = mean(codes - (w - e) / s)

    Args:
        groups: float32.
        bits: width of a code.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    top = 2**bits - 1
    inverse = torch.where(high - low <= _NARROW, 1.0, top / (high - low)).clamp(max=_STEEP)
    zero = -low * inverse
    if bits == 4:  # as the package's own configuration has it
        zero = zero.round()
    least = torch.inf
    for _ in range(_ROUNDS):
        codes = (groups * inverse + zero).round_().clamp_(0, top)
        error = groups - (codes - zero) / inverse
        shrunk = error.abs().sub_(error.abs().pow_(_NORM - 1).mul_(1 / _WEIGHT)).relu_().mul_(error.sign())
        zero = (codes - (groups - shrunk) * inverse).mean(1, keepdim=True)
        mean = error.abs().mean().item()
        if mean >= least:
            break
        least = mean
    return (groups * inverse + zero).round_().clamp_(0, top), 1 / inverse, zero
