"""The problem that every solver gets, and what its solvers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigurationError
from .linalg import not_negative, uniform
from .metrics import Identity, Metric
from .subspace import KrylovSearch, Subspace, dense_subspace, left_singular_subspace, worth_iterating

TOLERANCE = 1e-3
"""Default of how far an iterative solution may be above the optimum: a share of the optimum, and of its own gain."""

_ROWS = 512  # rows of the error that are converted to float64 at a time
_BLOCK = 32  # columns that a round of the iteration adds: fewer make more rounds, more make more columns altogether


class Factors(NamedTuple):
    """The two factors of a correction `C = lora_B @ lora_A`, with any split of its scale between them.

    Attributes:
        lora_B: left factor, any float dtype.
        lora_A: right factor, same dtype.
    """

    lora_B: Float[Tensor, "out_features rank"]
    lora_A: Float[Tensor, "rank in_features"]


@final
class Deferred:
    """A number that is computed when it is first read, once for all who share it.

    Afterwards the tensors that it was computed from are freed.
    """

    def __init__(self, compute: Callable[[], float]) -> None:
        self._compute: Callable[[], float] | None = compute
        self._value = 0.0

    @classmethod
    def known(cls, value: float) -> Deferred:
        """Return a number that is known already, without anything to compute."""
        return cls(partial(float, value))

    def __reduce__(self) -> tuple[object, ...]:
        return Deferred.known, (self.value,)  # a copy or a file gets the number alone

    @property
    def value(self) -> float:
        """The number."""
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None
        return self._value


@final
@dataclass(frozen=True, eq=False)
class Objective:
    """`min tr((E - C) H (E - C)^T)` over `C = lora_B @ lora_A` of a given rank.

    What several solvers need is computed once and kept: the value at `C = 0`, when it is first read, and the leading
    directions for each metric.

    Attributes:
        error: `E = W - Q`, any float dtype.
        metric: the metric `H`.
        row_scale: the root of each output's weight, where outputs count differently. `error` is then `E` with its rows
            multiplied by this root, and solvers find the correction of the scaled error. `finish` divides its rows
            by the root afterwards.
        mean: `mu = E[x]`, for families of adapters with a bias.
        base: returns `Q` as the quantized layer computes with it, for families that multiply it.
    """

    error: Float[Tensor, "out_features in_features"]
    metric: Metric
    row_scale: Float[Tensor, "out_features 1"] | None = None
    mean: Float[Tensor, " in_features"] | None = None
    base: Callable[[], Tensor] | None = None
    _found: dict[Metric, tuple[float, Subspace]] = field(default_factory=dict, init=False, repr=False)
    _searches: dict[Metric, KrylovSearch] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def total(self) -> Deferred:
        """The error without any correction, `tr(E H E^T)`; for a wide layer more work than finding the optimum."""
        return Deferred(partial(self.metric.energy, self.error))

    @property
    def value_at_zero(self) -> float:
        """`tr(E H E^T)`: the error without any correction."""
        return self.total.value

    def value(self, lora_B: Float[Tensor, "out_features rank"], lora_A: Float[Tensor, "rank in_features"]) -> float:
        """Return `tr((E - C) H (E - C)^T)` at `C = lora_B @ lora_A`.

        It is squared and a total over outputs. It is a mean over tokens for a Gram metric only.
        """
        return not_negative(self.value_at_zero - self.measure(lora_B, lora_A)[0])

    def value_of(self, change: Tensor, bias: Float[Tensor, " out_features"] | None = None) -> float:
        """Return `E |(E - C) x - b|^2` of a dense `C` and a bias, which is `value` without a bias.

        It is squared, a total over outputs, and computed in float64.

        Args:
            change: `C`, (out_features, in_features), or what broadcasts to it.
            bias: `b`; None for no bias.
        """
        left = self.error.double() - change
        if bias is None or self.mean is None or isinstance(self.metric, Identity):
            return self.metric.energy(left) + (0.0 if bias is None else bias.double().square().sum().item())
        # E |F x - b|^2 = E |F (x - mu)|^2 + |F mu - b|^2.
        rest = left @ self.mean.double() - bias
        return self.metric.centered(self.mean).energy(left) + rest.square().sum().item()

    def measure(
        self, lora_B: Float[Tensor, "out_features rank"], lora_A: Float[Tensor, "rank in_features"]
    ) -> tuple[float, Float[Tensor, "rank rank"]]:
        """Return what `C = lora_B @ lora_A` gains, and `lora_A H lora_A^T`, from which energies follow.

        The gain is `tr(E H E^T) - tr((E - C) H (E - C)^T) = 2 tr(C H E^T) - tr(C H C^T)`, so that neither a dense
        `E - C` nor the error without correction is needed. Both terms are computed in float64, where their cancellation
        costs about 1e-16 of the larger term.
        """
        # tr(C H C^T) = tr((B^T B) (A H A^T)) and tr(C H E^T) = tr(B^T (E H A^T)): every product has a side of length r.
        lora_B, lora_A = lora_B.double(), lora_A.double()
        weighted = self.metric.product(lora_A)
        gram = weighted @ lora_A.T
        overlap = sum(
            ((rows.double() @ weighted.T) * left).sum()
            for rows, left in zip(torch.split(self.error, _ROWS), torch.split(lora_B, _ROWS), strict=True)
        )
        return (2 * overlap - ((lora_B.T @ lora_B) * gram).sum()).item(), gram

    def gain_of_projection(self, lora_A: Float[Tensor, "rank in_features"]) -> float:
        """Return what `C = U U^T E` gains, given `lora_A = U^T E` for orthonormal `U`: `tr(lora_A H lora_A^T)`.

        A single product in the dtype of `lora_A`, with its rounding, where `measure` makes two in float64.
        """
        # With C = U U^T E: 2 tr(C H E^T) - tr(C H C^T) = tr(U^T E H E^T U), since U^T U is the identity.
        return (self.metric.product(lora_A) * lora_A).sum(dtype=torch.float64).item()

    def subspace(self, rank: int, metric: Metric | None = None, tolerance: float = TOLERANCE) -> Subspace:
        """Return the leading eigenvectors `U` of `E H E^T`: `U U^T E` is the best correction of its rank in `H`.

        (Eckart-Young for `E L`, where `L L^T = H`.) Neither a square root nor an inverse of `H` is needed, so `H` may
        be singular. Where the shorter side of `E` is long against the rank, block Krylov iteration finds them by
        products of `E`, `H` and `E^T` with a few columns. Otherwise, and where the iteration does not converge, one
        dense eigenproblem of the shorter side is solved. What was found for a metric is kept: it gives every lower
        rank, and the search for a higher rank goes on from it.

        Args:
            rank: number of directions, at most `min(out_features, in_features)`.
            metric: `H`; the metric of this objective by default.
            tolerance: how far above the optimum an iterative solution may be, as a share of the optimum and of what it
                gains.
        """
        # A search is kept with the metric it was made in. It serves a lower rank by its first directions, and a higher
        # rank or a tighter tolerance by going on; what was found densely is exact and serves every tolerance.
        metric = metric or self.metric
        reached, known = self._found.get(metric, (torch.inf, None))
        if known is None or known.rank < rank or reached > tolerance:
            known = self._search(rank, metric, tolerance) or self._dense(rank, metric)
            self._found[metric] = tolerance if known.applications else 0.0, known
        return known.leading(rank)

    def projection(self, found: Subspace) -> Factors:
        """Return the correction `U U^T E` of the directions found, as `(U, U^T E)`."""
        return Factors(found.basis, found.basis.T @ self.error.to(found.basis.dtype))

    def bound(self, rank: int) -> float:
        """Return an error that no correction of this rank goes below: the optimum, less what iteration left open."""
        # tr(E H E^T) less what the directions found capture is the error of the best correction in them. The optimum
        # can be lower by the slack at most.
        found = self.subspace(rank)
        gain, _ = self.measure(*self.projection(found))
        return not_negative(self.value_at_zero - gain - found.slack)

    def _search(self, rank: int, metric: Metric, tolerance: float) -> Subspace | None:
        error = self._working
        side = min(error.shape)
        if not worth_iterating(side, rank, decaying=metric.rooted(error[:1]) is None):
            return None
        if metric not in self._searches:
            random = uniform((_BLOCK, error.shape[1]), error, seed=0)
            # E H random^T costs half of a product with E H E^T, and its columns are no longer random directions.
            start = error @ metric.product(random).T
            self._searches[metric] = KrylovSearch(lambda at: error @ metric.product((error.T @ at).T).T, start)
        return self._searches[metric].find(rank, tolerance=tolerance, limit=side // 2)

    def _dense(self, rank: int, metric: Metric) -> Subspace:
        rooted = metric.rooted(self._working)
        if rooted is not None:
            return left_singular_subspace(rooted, rank)
        # A tall E = Q R has E H E^T = Q (R H R^T) Q^T: the smaller matrix in the middle has the same nonzero
        # eigenvalues, and its eigenvectors v become Q v.
        exact = self.error.double()  # a spectrum that decays can fall below float32's rounding of its largest value
        if exact.shape[0] <= exact.shape[1]:
            return dense_subspace(metric.product(exact) @ exact.T, rank)
        basis, reduced = torch.linalg.qr(exact)  # a tall error in a basis of its range, so that the problem is short
        return dense_subspace(metric.product(reduced) @ reduced.T, rank).rotated(basis)

    @cached_property
    def _working(self) -> Float[Tensor, "out_features in_features"]:
        return self.error.to(torch.promote_types(self.error.dtype, torch.float32))


def check_tolerance(tolerance: float) -> None:
    """Raise a `ConfigurationError` unless a tolerance is positive; called when a solver is made."""
    if not 0 < tolerance < math.inf:
        raise ConfigurationError(f"Expected a tolerance above 0, got {tolerance}.")
