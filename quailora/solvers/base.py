"""The interface of all solvers, and the low-rank correction that they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import near, not_negative, product_svd, uniform
from ..core.metrics import Metric
from ..core.objective import Deferred, Factors, Objective
from ..errors import NumericalError


@final
@dataclass(frozen=True, eq=False)
class LowRank:
    """A correction `C = lora_B @ lora_A` for one layer, in PEFT's orientation and before PEFT's scaling.

    The factors are balanced: with the singular value decomposition `C = U S V^T`, `lora_B = U sqrt(S)` and
    `lora_A = sqrt(S) V^T`. A direction with no correction left to make starts as in plain LoRA (its row of `lora_A`
    uniform in `+-1/sqrt(in_features)`, its column of `lora_B` zero), so that it can still be trained.

    Attributes:
        lora_A: right factor, float32 (float64 for a float64 error).
        lora_B: left factor, same dtype.
        gain: by how much exactly these factors lower the error, `tr(E H E^T) - tr((E - C) H (E - C)^T)`, in the metric
            the solver was given.
        energies: energy of each direction of the correction, `eig(C H C^T)`, descending. At the optimum these are the
            captured energies, and they add up to `gain`.
        total: the error without correction, `tr(E H E^T)`. It is computed when it, `error`, `bound` or `history` is
            first read: in a wide layer that is more work than the solution. Until then it keeps `E` and `H` alive.
        slack: how much more than `gain` a correction of this rank can gain; None where the solver does not know. See
            `Subspace.upper` for when it holds.
        iterations: rounds that were run; 0 for direct solvers.
        gains: gain after each round, starting with round 0, for iterative solvers; all but the first to the rounding of
            products in the dtype of the factors.
    """

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    gain: float
    energies: Float[Tensor, " rank"]
    total: Deferred
    slack: float | None = None
    iterations: int = 0
    gains: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """Achieved `tr((E - C) H (E - C)^T)` of exactly these factors, in the metric the solver was given."""
        return not_negative(self.total.value - self.gain)

    @property
    def bound(self) -> float:
        """No correction of this rank has a smaller error than this; 0 where the solver does not know."""
        return 0.0 if self.slack is None else not_negative(self.error - self.slack)

    @property
    def history(self) -> tuple[float, ...]:
        """Error after each round, see `gains`."""
        return tuple(not_negative(self.total.value - gain) for gain in self.gains)

    @property
    def factors(self) -> Factors:
        """Both factors."""
        return Factors(self.lora_B, self.lora_A)

    @property
    def rank(self) -> int:
        """Rank of the adapter, trainable directions included."""
        return len(self.lora_A)

    def dense(self) -> Float[Tensor, "out_features in_features"]:
        """Return `C = lora_B @ lora_A`."""
        return self.lora_B @ self.lora_A


class Solver(ABC):
    """Finds a low-rank correction `C` that brings `Q + C` close to `W`, given `E = W - Q` and a metric.

    Laws, for every error, metric and rank:

    - `C = 0` is never better than the result, in the metric that was given.
    - A solver with `needs_calibration = True` is never worse than the uncalibrated SVD, in the metric that was given.
      If its algorithm cannot promise that, it compares both and keeps the better one.
    - The error does not increase with the rank, is zero at full rank, and is never below the optimum.

    A solver is either this class or final. Its hyper-parameters are the fields of a frozen dataclass.
    """

    name: ClassVar[str] = ""
    """Short name on the command line and in files; a class without one is named by its import path."""
    needs_calibration: ClassVar[bool]
    """Whether the solver uses the metric, and so needs calibration data."""

    @final
    def solve(self, error: Tensor, metric: Metric, rank: int) -> LowRank:
        """Return a correction of the given rank.

        Args:
            error: `E = W - Q`, shape (out_features, in_features); half types are worked on in float32.
            metric: the metric `H`.
            rank: from 1 to `min(out_features, in_features)`.

        Raises:
            ValueError: if the rank or the shape is out of range.
            NumericalError: if the error has NaN or infinite entries.
        """
        check_rank(rank, error.shape)
        if not error.isfinite().all():
            raise NumericalError("Expected a finite error matrix, got NaN or infinity.")
        return self.minimise(Objective(error, metric), rank)

    @abstractmethod
    def minimise(self, objective: Objective, rank: int) -> LowRank:
        """Solve an objective whose parts have been checked; `finish` turns factors into the result."""


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless a matrix of this shape can carry an adapter of this rank."""
    if len(shape) != 2:
        raise ValueError(f"Expected a matrix (out_features, in_features), got shape {tuple(shape)}.")
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"Expected a rank from 1 to {min(shape)} for a layer of shape {tuple(shape)}, got {rank}. "
            "Lower the rank, or give such layers their own with rank_pattern."
        )


def finish(
    objective: Objective,
    factors: Factors,
    *,
    slack: float | None = None,
    iterations: int = 0,
    gains: tuple[float, ...] = (),
) -> LowRank:
    """Balance factors, cast them to the dtype they are stored in, and measure what they gain.

    Args:
        objective: the problem that was solved.
        factors: factors of the solution, any float dtype.
        slack: how far the error may be above the optimum, where that is known.
        iterations: rounds that the solver ran; see `LowRank`.
        gains: gain after each round; see `LowRank`.
    """
    lora_B, lora_A = balanced(objective, factors)
    # The energies are the eigenvalues of C H C^T = B (A H A^T) B^T. With B = Q R and orthonormal Q those other than
    # zero are the eigenvalues of R (A H A^T) R^T, which is r x r.
    gain, gram = objective.measure(lora_B, lora_A)
    left_r = torch.linalg.qr(lora_B.double()).R
    square = left_r @ gram @ left_r.T
    energies = torch.linalg.eigvalsh(near((square + square.T) / 2)).flip(0).clamp(min=0).to(square.device)
    if objective.row_scale is not None:
        lora_B, lora_A = balanced(objective, Factors(lora_B / objective.row_scale, lora_A))
    return LowRank(lora_A, lora_B, gain, energies, objective.total, slack, iterations, gains)


def balanced(objective: Objective, factors: Factors) -> Factors:
    """Return balanced factors of the same product, in the dtype they are stored in; see `LowRank`.

    Args:
        objective: the problem that was solved.
        factors: `(lora_B, lora_A)`, any float dtype.
    """
    # B A = U S V^T = (U sqrt(S)) (sqrt(S) V^T): both factors get the same norm in every direction. Of all splits this
    # one has the least sum of squares, and neither factor is the first to overflow or to vanish when it is rounded.
    dtype = torch.promote_types(objective.error.dtype, torch.float32)
    left, singular, right = product_svd(factors.lora_B.double(), factors.lora_A.double())
    root = singular.sqrt()
    lora_B, lora_A = (left * root).to(dtype), (root[:, None] * right).to(dtype)

    # Below the resolution of the factors a direction carries rounding only, unless it meets a massive input channel.
    # Plain LoRA's start keeps it trainable.
    resolution = 8 * torch.finfo(factors.lora_B.dtype).eps
    spent = singular <= resolution * singular[0]
    if spent.any():
        rows = singular[spent, None] * right[spent]
        energy = (objective.metric.product(rows) * rows).sum(1)
        if energy.any():
            spent[spent.clone()] = energy <= resolution**2 * objective.value_at_zero
    if spent.any():
        fresh = uniform(lora_A.shape, lora_A) / math.sqrt(lora_A.shape[1])
        lora_A = torch.where(spent[:, None], fresh, lora_A)
        lora_B = torch.where(spent, 0, lora_B)
    return Factors(lora_B, lora_A)
