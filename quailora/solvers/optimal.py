"""The exact minimiser of the calibrated objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from typing_extensions import override

from ..core.metrics import check_damping
from ..core.objective import TOLERANCE, Objective, check_tolerance
from .base import LowRank, Solver, finish
from .svd import SVD


@final
@dataclass(frozen=True)
class Optimal(Solver):
    """`min tr((E - C) H (E - C)^T)` over `rank(C) <= r`, solved exactly.

    `C = U_r U_r^T E`, with `U_r` the leading eigenvectors of `E H E^T`; the minimum is the sum of the remaining
    eigenvalues (Eckart-Young in the metric). It is the limit of QuAILoRA's iterations and the same correction as
    QERA-exact (Zhang et al., 2024, arXiv 2410.06040, theorem 1), CLoQ and EoRA, without their square root and inverse
    of `H`, so a singular `H` needs no repair. The eigenvectors come from `Objective.subspace`: wide layers cost a few
    hundred columns of products with `E`, `H` and `E^T`. The result's `bound` says how good it is.

    Attributes:
        damping: adds `damping * mean(diag H)` to the diagonal of `H`; a knob for generalisation, not for stability.
            If the damped solution is worse than the uncalibrated one in the undamped metric, the latter is returned.
        tolerance: how far above the optimum the result may be where it is found by iteration, as a share of the
            optimum and of the gain. Small problems are solved densely, to rounding.
    """

    name: ClassVar[str] = "optimal"

    damping: float = 0.0
    tolerance: float = TOLERANCE

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_tolerance(self.tolerance)

    @override
    def minimise(self, objective: Objective, rank: int) -> LowRank:
        # Eckart-Young: among all matrices of rank r, U_r U_r^T E is nearest to E in the norm of E L with H = L L^T,
        # because (U_r U_r^T E) L is the truncated singular value decomposition of E L, and L drops out of the
        # projection.
        subspace = objective.subspace(rank, objective.metric.damped(self.damping), self.tolerance)
        if not self.damping and self.tolerance <= TOLERANCE:
            return finish(objective, objective.projection(subspace), slack=subspace.slack)
        # With damping the solution is the optimum of another metric, and can be worse in this one than a correction
        # that does not look at the inputs at all. So can one that is far from the optimum.
        solution = finish(objective, objective.projection(subspace), slack=None if self.damping else subspace.slack)
        return max(solution, SVD(self.tolerance).minimise(objective, rank), key=lambda candidate: candidate.gain)
