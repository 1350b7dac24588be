"""The optimum in a metric that counts correlations less, or the uncalibrated one where that is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from quailora import SVD, LowRank, Solver
from quailora.core.objective import Objective
from quailora.solvers.base import finish


@final
@dataclass(frozen=True)
class Careful(Solver):
    """Solve with a ridge on the diagonal of `H`.

    Attributes:
        damping: the ridge, relative to the mean of the diagonal.
    """

    name: ClassVar[str] = "careful"
    needs_calibration: ClassVar[bool] = True

    damping: float = 0.5

    def minimise(self, objective: Objective, rank: int) -> LowRank:
        found = objective.subspace(rank, objective.metric.damped(self.damping))
        solution = finish(objective, objective.projection(found))
        return max(solution, SVD().minimise(objective, rank), key=lambda candidate: candidate.gain)
