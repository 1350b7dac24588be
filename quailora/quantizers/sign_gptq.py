"""One bit a weight, with error feedback."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.metrics import SHRINKAGE, check_damping, check_shrinkage
from ..core.statistics import InputStatistics
from .base import Quantizer
from .gptq import better_of, damped_factor, sweep
from .groups import check_group_size
from .packing import pack
from .sign import Sign, SignWeight, magnitudes


@final
@dataclass(frozen=True)
class SignGPTQ(Quantizer):
    """`Sign` with error feedback: columns become signs in turn, and those still to come make up for the error made.

    The scales of a group are fitted when its first column is due. Where the sweep is no better than `Sign` in the
    metric of `H`, the latter is returned.

    Attributes:
        group_size: consecutive input columns that share a scale; None for one scale a row.
        damping: added to the diagonal of `H`, relative to its median; see `GPTQ`.
        shrinkage: share of the correlations between input channels that is taken off `H`; see `GPTQ`.
    """

    name: ClassVar[str] = "sign_gptq"

    group_size: int | None = 64
    damping: float = 0.01
    shrinkage: float = SHRINKAGE

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_group_size(self.group_size)
        check_damping(self.damping)
        check_shrinkage(self.shrinkage)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> SignWeight:
        assert statistics is not None  # `quantize` has checked it
        statistics = statistics.to(weight.device)
        nearest = Sign(self.group_size).encode(weight, None)
        full, group_size = weight.float(), nearest.group_size
        columns = full.T.clone(memory_format=torch.contiguous_format)
        _, _, factor = damped_factor(statistics, self.damping, "median", self.shrinkage)
        scales: list[Tensor] = []

        def levels(column: int) -> SignLevels:
            if column % group_size == 0:
                run = columns[column : column + group_size].T
                scales.append(magnitudes(run[:, None], run.shape[1], run.shape[1])[:, 0])
            return SignLevels(scales[-1].float())

        codes, _ = sweep(columns, factor, levels, group_size)
        swept = replace(nearest, codes=pack(codes.T.to(torch.uint8), 1), scale=torch.stack(scales, 1))
        return better_of(swept, nearest, weight, statistics)

    @override
    def with_feedback(self, damping: float | None = None) -> SignGPTQ:
        return self if damping is None else replace(self, damping=damping)

    @override
    def with_least_error(self) -> Sign:
        return Sign(self.group_size)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


@final
@dataclass(frozen=True, eq=False)
class SignLevels:
    """Plus and minus the scale of each row: what one column can be rounded to.

    Attributes:
        scale: the scales.
    """

    scale: Float[Tensor, " out_features"]

    def encode(self, weight: Float[Tensor, " out_features"]) -> Float[Tensor, " out_features"]:
        """Return the code of the nearest level."""
        return (weight >= 0).float()

    def decode(self, codes: Float[Tensor, " out_features"]) -> Float[Tensor, " out_features"]:
        """Return the levels of codes."""
        return (2 * codes - 1) * self.scale
