"""The exact minimiser of the calibrated objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..linalg import leading_subspace
from ..metrics import Objective, check_damping
from .base import LowRank, Solver, finish
from .svd import SVD


@final
@dataclass(frozen=True)
class Optimal(Solver):
    """`min tr((E - C) H (E - C)^T)` over `rank(C) <= r`, solved exactly.

    `C = U_r U_r^T E`, with `U_r` the leading eigenvectors of `E H E^T`; the minimum is the sum of the remaining
    eigenvalues (Eckart-Young in the metric). It is the limit of QuAILoRA's iterations and the same correction as
    QERA-exact (Zhang et al., 2024, arXiv 2410.06040, theorem 1), CLoQ and EoRA, without their square root and inverse
    of `H`, so a singular `H` needs no repair. Cost: one eigenproblem of the shorter side, in float64.

    Attributes:
        damping: adds `damping * mean(diag H)` to the diagonal of `H`; a knob for generalisation, not for stability.
            If the damped solution is worse than the uncalibrated one in the undamped metric, the latter is returned.
    """

    damping: float = 0.0

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def minimise(self, objective: Objective, rank: int) -> LowRank:  # noqa: D102
        product = objective.product
        if self.damping:
            product = objective.metric.damped(self.damping).product(objective.error)
        basis = leading_subspace(objective.error64, product, rank)
        solution = finish(objective, (basis, basis.T @ objective.error64))
        if not self.damping:
            return solution
        return min(solution, SVD().minimise(objective, rank), key=lambda candidate: candidate.error)
