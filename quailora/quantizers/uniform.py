"""Round to nearest on a uniform grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.statistics import InputStatistics
from .base import Quantizer
from .grid import Grid, GridWeight, check_bits_and_group
from .groups import join_groups, split_groups


@final
@dataclass(frozen=True)
class Uniform(Quantizer):
    """2 to 8 bits: nearest of `2^bits` evenly spaced levels, with a float16 scale a row and group.

    The baseline that GPTQ starts from, on the same grid. Not idempotent in general: a scale rounded up to float16 can
    cost a group its outermost level.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale; None for one scale a row.
        symmetric: fixed zero point `2^(bits-1)` instead of a stored one.
        mse: scales with the least squared error, in place of those that span the range of their group.
    """

    name: ClassVar[str] = "uniform"

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    mse: bool = False

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group_size)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> GridWeight:
        del statistics
        group_size = self.group_size or weight.shape[1]
        codes, grid = nearest(weight.float(), self.bits, self.symmetric, group_size, self.mse)
        return GridWeight.store(codes, grid, group_size=group_size, dtype=weight.dtype)

    @override
    def with_feedback(self, damping: float | None = None) -> Quantizer:
        from .gptq import GPTQ  # which rounds to the grid of this module

        damping = GPTQ.damping if damping is None else damping
        return GPTQ(self.bits, self.group_size, self.symmetric, damping=damping, mse=self.mse, shrinkage=0.0)

    @override
    def with_least_error(self) -> Uniform:
        return replace(self, mse=True)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


def nearest(
    weight: Float[Tensor, "out_features in_features"], bits: int, symmetric: bool, group_size: int, mse: bool = False
) -> tuple[Float[Tensor, "out_features in_features"], Grid]:
    """Return the codes of the nearest levels, and the grid of each group of consecutive columns."""
    grouped = split_groups(weight, group_size)
    grid = Grid.fit(grouped, bits, symmetric, mse)
    return join_groups(grid.over_groups().encode(grouped), weight.shape[1]), grid
