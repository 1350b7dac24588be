"""The uncalibrated optimum: a truncated singular value decomposition of the quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..linalg import leading_subspace
from ..metrics import Objective
from .base import Factors, LowRank, Solver, finish


@final
@dataclass(frozen=True)
class SVD(Solver):
    """`min ||E - C||_F` over `rank(C) <= r`: the best correction that knows nothing of the inputs.

    Equivalent to the truncated `torch.linalg.svd(E)`, computed as an eigenproblem of the shorter side in float64.
    It is the uncalibrated objective of QuAILoRA (eq. 2), LoRC (Yao et al., 2023, arXiv 2303.08302) and one step of
    LoftQ (Li et al., 2023, arXiv 2310.08659). In any metric it is at least as good as no correction, because it only
    projects the error's output side, but it can be far from the optimum there.
    """

    calibrated: ClassVar[bool] = False

    def minimise(self, objective: Objective, rank: int) -> LowRank:  # noqa: D102
        return finish(objective, uncalibrated_factors(objective, rank))


def uncalibrated_factors(objective: Objective, rank: int) -> Factors:
    """Return the best factors in the Frobenius norm, float64: `U_r` and `U_r^T E`."""
    basis = leading_subspace(objective.error64, objective.error64, rank)
    return basis, basis.T @ objective.error64
