"""QuAILoRA: alternating least squares on the calibrated objective (Lawton et al., 2024, arXiv 2410.14713)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from typing_extensions import override

from ..core.metrics import Identity, check_damping
from ..core.objective import Factors, Objective
from ..errors import ConfigurationError
from .base import LowRank, Solver, finish

_ROUNDING = 4  # machine epsilons of the gain that two rounds of the same error may differ by


@final
@dataclass(frozen=True)
class AlternatingLeastSquares(Solver):
    """QuAILoRA: from the SVD start, update each factor in turn by least squares in the metric.

    The paper's updates, with `A` = `lora_B` (out x r) and `B` = `lora_A^T` (in x r):

        A   <- E H B (B^T H B)^-1        (eq. 5)
        B^T <- (A^T A)^-1 A^T E          (eq. 6)

    After eq. 6 the correction is `P E`, with `P` the projector onto the columns of `A`. It depends on their span
    alone, and `span(A) = span(E H B)`. So `A` is replaced by an orthonormal basis of its span (QR) and no normal
    equations are formed or inverted: the same iterates, without the squared condition number that makes eqs. 5 and 6
    diverge in float32 once one input channel is thousands of times larger than the rest.

    The error cannot rise from one round to the next in exact arithmetic and without damping. The best round is
    returned in any case, the last one of those that rounding cannot tell apart; it and the SVD start are compared
    exactly.

    Attributes:
        iterations: rounds of both updates; the paper uses 20.
        damping: adds `damping * mean(diag H)` to the diagonal of `H` in eq. 5; the paper uses none.
    """

    name: ClassVar[str] = "quailora"

    iterations: int = 20
    damping: float = 0.0

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.iterations < 0:
            raise ConfigurationError(f"Expected a number of iterations of at least 0, got {self.iterations}.")

    @override
    def minimise(self, objective: Objective, rank: int) -> LowRank:
        error = objective.error.to(torch.promote_types(objective.error.dtype, torch.float32))
        metric = objective.metric.damped(self.damping)
        start = best = objective.projection(objective.subspace(rank, Identity()))
        gains = [objective.measure(*start)[0]]
        lora_A, most = start.lora_A.to(error.dtype), gains[0]
        blur = 0.0 if self.damping else _ROUNDING * torch.finfo(error.dtype).eps
        # Eq. 5 minimises tr((E - A B^T) H (E - A B^T)^T) over A for a fixed B, and eq. 6 over B for a fixed A. The
        # latter does not depend on H: for any H, the best rows are the projection of E onto the span of A. So each half
        # of a round is an exact minimisation, and the error cannot rise.
        for _ in range(self.iterations):
            # Eq. 5 up to the r x r matrix (B^T H B)^-1 on its right, which changes columns but not their span. With Q
            # an orthonormal basis of that span, eq. 6 becomes B^T = Q^T E, since (Q^T Q)^-1 is the identity.
            lora_B = torch.linalg.qr(error @ metric.product(lora_A).T).Q
            lora_A = lora_B.T @ error
            # Without damping a later round is the better one in exact arithmetic, so rounding may hide by how much.
            # With damping it need not be, and is measured exactly.
            if self.damping:
                gains.append(objective.measure(lora_B, lora_A)[0])
            else:
                gains.append(objective.gain_of_projection(lora_A))
            if gains[-1] >= most - blur * abs(most):
                best, most = Factors(lora_B, lora_A), max(most, gains[-1])
        if objective.measure(*best)[0] < gains[0]:
            best = start
        return finish(objective, best, iterations=self.iterations, gains=tuple(gains))
