"""The uniform grid that `Uniform` and `GPTQ` round to, and the weight it stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int, Real, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigurationError, NumericalError
from .base import QuantizedWeight
from .groups import check_group_size, consecutive_groups, join_groups, over_columns, split_groups
from .packing import pack, pack_words, unpack

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Of the range of a group, to choose from where the squared error decides."""


_LEAST = 2.0**-24  # smallest scale in float16

STOCK_BITS = (2, 3, 4, 8)
"""Widths of a code that transformers reads in AutoGPTQ's format."""


@final
@dataclass(frozen=True, eq=False)
class Grid:
    """Levels `scale * (code - zero_point)`, `code = 0 .. 2^bits - 1`; one scale for each row of a group of columns.

    Attributes:
        scale: spacing of the levels, rounded to float16 as it is stored, held in float32.
        zero_point: code of the value zero, an integer held in float32.
        bits: width of a code.
    """

    scale: Float[Tensor, "out_features *groups"]
    zero_point: Float[Tensor, "out_features *groups"]
    bits: int

    @classmethod
    def fit(
        cls, weight: Float[Tensor, "out_features *groups group"], bits: int, symmetric: bool, mse: bool = False
    ) -> Grid:
        """Span the range of each group, zero included.

        Asymmetric: from the smallest to the largest value. Symmetric: from minus to plus the largest magnitude, with
        zero at code `2^(bits-1)`, so the top level falls half a step short of it. Both as in the GPTQ papers' code.

        Args:
            weight: the weight, split into groups of columns.
            bits: width of a code.
            symmetric: whether the grid is symmetric around zero.
            mse: span the share of the range, among `SHARES`, that gives each group the least squared error.

        Raises:
            NumericalError: if a scale overflows float16.
        """
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        best = cls.spanning(low, high, bits, symmetric)
        if not mse:
            return best
        # A narrower grid clips the ends of a group and has finer levels in between. All groups try one share of their
        # range after the other, and each keeps the best one, so that none ends worse than with its full range.
        least = best.over_groups().squared_error(weight)
        for share in SHARES:
            grid = cls.spanning(share * low, share * high, bits, symmetric)
            error = grid.over_groups().squared_error(weight)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, grid.scale, best.scale)
            best = cls(scale, torch.where(better, grid.zero_point, best.zero_point), bits)
        return best

    @classmethod
    def spanning(
        cls,
        low: Float[Tensor, "out_features *groups"],
        high: Float[Tensor, "out_features *groups"],
        bits: int,
        symmetric: bool,
    ) -> Grid:
        """Return the grid from one end to another; see `fit`."""
        # The scale is rounded to float16 here, as it will be stored, so that codes are found for the levels that the
        # layer will have. A group of zeros has no scale of its own and takes one, which decodes to zero all the same.
        top = 2**bits - 1
        scale = ((high - low) / top).half().float()
        if not scale.isfinite().all():
            largest = max(high.max().item(), -low.min().item())
            raise NumericalError(f"Expected scales that fit float16, but a weight has magnitude {largest:.3g}.")
        scale = torch.where((scale == 0) & (high > low), _LEAST, scale)
        scale = torch.where(scale == 0, 1, scale)
        zero_point = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
        return cls(scale, zero_point, bits)

    def encode(self, weight: Float[Tensor, "out_features *columns"]) -> Float[Tensor, "out_features *columns"]:
        """Return the code of the nearest level, as an integer held in float32. Shapes must broadcast."""
        # The zero point is an integer, so rounding before it is added gives the nearest level.
        return ((weight / self.scale).round() + self.zero_point).clamp(0, 2**self.bits - 1)

    def decode(self, codes: Float[Tensor, "out_features *columns"]) -> Float[Tensor, "out_features *columns"]:
        """Return the level of each code."""
        return (codes - self.zero_point) * self.scale

    def squared_error(
        self, weight: Float[Tensor, "out_features *groups group"]
    ) -> Float[Tensor, "out_features *groups"]:
        """Return the squared error of rounding each group to the nearest levels; see `over_groups`."""
        return (weight - self.decode(self.encode(weight))).square().sum(-1)

    def over_groups(self) -> Grid:
        """Return the grid for weights that `split_groups` has reshaped."""
        return Grid(self.scale[..., None], self.zero_point[..., None], self.bits)

    def decode_groups(
        self, codes: Float[Tensor, "out_features in_features"], group_size: int
    ) -> Float[Tensor, "out_features in_features"]:
        """Return the level of each code, where groups are consecutive columns."""
        return join_groups(self.over_groups().decode(split_groups(codes, group_size)), codes.shape[1])

    def column(self, column: int) -> Grid:
        """Return the grid of one column."""
        return Grid(self.scale[:, column], self.zero_point[:, column], self.bits)

    def at(self, groups: Int[Tensor, " columns"]) -> Grid:
        """Return the grid of each column, given the group of each column."""
        return Grid(self.scale.index_select(1, groups), self.zero_point.index_select(1, groups), self.bits)


@final
@dataclass(frozen=True, eq=False)
class GridWeight(QuantizedWeight):
    """Packed codes, float16 scales, and zero points and group indices only where they are not implied.

    Equal weights are stored equally, whatever quantizer or checkpoint they come from.

    Attributes:
        codes: packed codes, row-major.
        scale: float16, a row's groups in order.
        zero_point: packed zero points, or None for a symmetric grid, where they are all `2^(bits-1)`.
        group_index: group of each column, or None where groups are consecutive columns.
        bits: width of a code.
        group_size: columns that share a scale.
        columns: `in_features`.
        dtype: dtype of the weight that was quantized.
    """

    layout: ClassVar[str] = "gptq"

    codes: UInt8[Tensor, " packed"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: UInt8[Tensor, " packed_zero_points"] | None
    group_index: Int[Tensor, " in_features"] | None
    bits: int
    group_size: int
    columns: int
    dtype: torch.dtype

    @classmethod
    def store(
        cls,
        codes: Real[Tensor, "out_features in_features"],
        grid: Grid,
        *,
        group_size: int,
        dtype: torch.dtype,
        group_index: Int[Tensor, " in_features"] | None = None,
    ) -> GridWeight:
        """Pack codes and the grid of each group; leave out zero points and group indices that are implied."""
        # A symmetric grid has all zero points in the middle, and consecutive groups follow from their size. What is
        # implied is not stored, so that bits a weight count what a checkpoint would hold, and equal weights have equal
        # hashes.
        zero_point = None
        if not bool((grid.zero_point == 2 ** (grid.bits - 1)).all()):
            zero_point = pack(grid.zero_point.to(torch.uint8), grid.bits)
        if group_index is not None:
            group_index = group_index.to(torch.int32)
            implied = consecutive_groups(codes.shape[1], group_size, group_index.device)
            group_index = None if torch.equal(group_index, implied.to(torch.int32)) else group_index
        return cls(
            codes=pack(codes.to(torch.uint8), grid.bits),
            scale=grid.scale.half(),
            zero_point=zero_point,
            group_index=group_index,
            bits=grid.bits,
            group_size=group_size,
            columns=codes.shape[1],
            dtype=dtype,
        )

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return len(self.scale), self.columns

    @property
    @override
    def scale_count(self) -> int:
        return self.scale.numel()

    @override
    def spread(self, factors: Float[Tensor, " scales"]) -> Float[Tensor, "out_features in_features"]:
        # Where groups are runs of columns, the gradient of a repetition is a sum. That of an index takes longer.
        matrix = factors.view(self.scale.shape)
        if self.group_index is not None:
            return matrix[:, self.group_index.long().to(factors.device)]
        return over_columns(matrix, self.group_size, self.columns)

    @override
    def rescaled(self, factors: Float[Tensor, " scales"]) -> GridWeight:
        return replace(self, scale=(self.scale.float() * factors.view(self.scale.shape).to(self.scale.device)).half())

    @property
    @override
    def code_count(self) -> int:
        return int(2**self.bits)

    @override
    def on(self, device: torch.device) -> GridWeight:
        index, zero = self.group_index, self.zero_point
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero_point=None if zero is None else zero.to(device),
            group_index=None if index is None else index.to(device),
        )

    @override
    def code_matrix(self) -> UInt8[Tensor, "out_features in_features"]:
        return unpack(self.codes, self.bits, self.shape)

    @override
    def decode(self, codes: Shaped[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        if self.group_index is not None:
            return self.grid.at(self.group_index.long()).decode(codes.float())
        return self.grid.decode_groups(codes.float(), self.group_size)

    @override
    def recoded(self, codes: Shaped[Tensor, "out_features in_features"]) -> GridWeight:
        return replace(self, codes=pack(codes.to(torch.uint8), self.bits))

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        optional = {"zero_point": self.zero_point, "group_index": self.group_index}
        present = {name: tensor for name, tensor in optional.items() if tensor is not None}
        return {"codes": self.codes, "scale": self.scale, **present}

    def packed(self) -> Mapping[str, Tensor]:
        """Return `qweight`, `qzeros`, `scales` and `g_idx` of AutoGPTQ's format, zero points as they are ("gptq_v2").

        Codes run along the inputs and zero points along the outputs, and both have to fill whole words of 32 bits.
        Empty where they do not, and for widths that transformers does not read.
        """
        (rows, columns), bits = self.shape, self.bits
        if bits not in STOCK_BITS or rows * bits % 32 or columns * bits % 32:
            return {}
        # The format packs codes down the columns: the transposed matrix of words of a row-major packing of the weight,
        # since a row fills whole words. Zero points are packed along the outputs.
        groups = consecutive_groups(columns, self.group_size, self.scale.device).int()
        return {
            "qweight": self.codes.view(torch.int32).view(rows, -1).T.contiguous(),
            "qzeros": pack_words(self.grid.zero_point.T.to(torch.uint8), bits),
            "scales": self.scale.T.contiguous(),
            "g_idx": groups if self.group_index is None else self.group_index,
        }

    @cached_property
    def grid(self) -> Grid:
        """Scales and zero points of the groups."""
        scale = self.scale.float()
        if self.zero_point is None:
            return Grid(scale, torch.full_like(scale, 2.0 ** (self.bits - 1)), self.bits)
        return Grid(scale, unpack(self.zero_point, self.bits, tuple(scale.shape)).float(), self.bits)

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        return self.decode(self.code_matrix()).to(self.dtype)


def check_bits_and_group(bits: object, group_size: object) -> None:
    """Raise a `ConfigurationError` for settings outside the grid's range; called when a quantizer is made."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigurationError(f"Expected 2 to 8 bits, got {bits}.")
    if group_size is not None:
        check_group_size(group_size)
