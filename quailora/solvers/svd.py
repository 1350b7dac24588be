"""The uncalibrated optimum: a truncated singular value decomposition of the quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from typing_extensions import override

from ..core.metrics import Identity
from ..core.objective import TOLERANCE, Objective, check_tolerance
from .base import LowRank, Solver, finish


@final
@dataclass(frozen=True)
class SVD(Solver):
    """`min ||E - C||_F` over `rank(C) <= r`: the best correction that knows nothing of the inputs.

    Equivalent to the truncated `torch.linalg.svd(E)`, by `Objective.subspace`.
    It is the uncalibrated objective of QuAILoRA (eq. 2), LoRC (Yao et al., 2023, arXiv 2303.08302) and one step of
    LoftQ (Li et al., 2023, arXiv 2310.08659). In any metric it is at least as good as no correction, because it only
    projects the error's output side, but it can be far from the optimum there.

    Attributes:
        tolerance: how far above the optimum the result may be where it is found by iteration, as a share of the
            optimum and of the gain. Small problems are solved densely, to rounding.
    """

    name: ClassVar[str] = "svd"

    tolerance: float = TOLERANCE

    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)

    @override
    def minimise(self, objective: Objective, rank: int) -> LowRank:
        subspace = objective.subspace(rank, Identity(), self.tolerance)
        return finish(objective, objective.projection(subspace))
