"""Input channels count by a power of what passes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from quailora import InputStatistics
from quailora.core.metrics import Diagonal, Metric
from quailora.core.weightings import Weighting


@final
@dataclass(frozen=True)
class Loudness(Weighting):
    """Between the metrics identity (exponent 0) and diagonal (exponent 1).

    Attributes:
        exponent: of the mean power of each channel.
    """

    name: ClassVar[str] = "loudness"

    exponent: float = 0.5

    def metric(self, statistics: InputStatistics) -> Metric:
        return Diagonal(statistics.second_moment.diagonal() ** self.exponent)
