"""VeRA: random projections that all layers share, and two vectors in each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import semidefinite_solve, small_eigh
from ..core.objective import Objective
from .adapter import Change, Parameters
from .base import Family
from .projections import check_key, drawn_rows
from .regression import base_of, quotient

_ROUNDS = 20
_LEAST_GAIN = 1e-3  # of the error: a round that gains less is the last one
_RIDGE = 1e-10  # of the diagonal
_SIZE = 0.1  # of lambda_d, as in PEFT's own start

_OUTPUTS, _INNER = "vera_lambda_b", "vera_lambda_d"


@final
@dataclass(frozen=True)
class Vera(Family):
    """`C = diag(vera_lambda_b) B diag(vera_lambda_d) A` (Kopiczko et al., 2023, arXiv 2310.11454).

    The projections `A` and `B` are random and are not trained. They are in the file once, as large as the largest
    layer needs, and each layer takes the first columns of `A` and the first rows of `B`. The best of either vector,
    given the other one, solves linear equations, and both are solved in turn from two starts.

    Attributes:
        projection_prng_key: seed of the projections.
    """

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    default_rank: ClassVar[int | None] = 256
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "hqq", "torchao"})

    projection_prng_key: int = 0

    def __post_init__(self) -> None:
        check_key(self.projection_prng_key)

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {_OUTPUTS: (shape[0],), _INNER: (rank,)}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        return {_OUTPUTS: torch.zeros(shape[0]), _INNER: torch.full((rank,), _SIZE)}  # two zeros would have no gradient

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        error = objective.error.double()
        left, right = self._projections((error.shape[0], error.shape[1]), rank, error)
        weighted = objective.metric.product(right)
        moment, overlap = weighted @ right.T, error @ weighted.T
        moment.diagonal().mul_(1 + _RIDGE)
        # Were the entries of B independent of everything else, C would gain 2 b^T (B o E H A^T) d at a cost that is
        # proportional to |b|^2 sum_k K_kk d_k^2. Of all vectors the leading singular ones gain most.
        size = torch.where(moment.diagonal() > 0, moment.diagonal(), 1).sqrt()
        scaled = left * overlap / size
        starts = torch.ones_like(size), small_eigh(scaled.T @ scaled)[1][:, -1] / size
        found = [_in_turn(left, moment, overlap, start, objective.value_at_zero) for start in starts]
        _, outputs, inner = max(found, key=lambda one: one[0])
        factor = inner.square().mean().sqrt() / _SIZE  # the vectors share one scale, which is arbitrary
        return {_OUTPUTS: outputs * factor, _INNER: inner / factor}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        outputs, inner = parameters[_OUTPUTS], parameters[_INNER]
        left, right = self._projections((len(outputs), base_of(self, base).shape[1]), len(inner), inner)
        return Change((outputs[:, None] * left) @ (inner[:, None] * right))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": sizes["r"], "projection_prng_key": self.projection_prng_key, "save_projection": True}

    @override
    def shared_numbers(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
        return rank * (max(rows for rows, _ in shapes.values()) + max(columns for _, columns in shapes.values()))

    @override
    def shared(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> Parameters:
        largest = (max(rows for rows, _ in shapes.values()), max(columns for _, columns in shapes.values()))
        left, right = self._projections(largest, rank, torch.empty(0))
        return {"base_model.vera_A": right, "base_model.vera_B": left}

    def _projections(
        self, shape: tuple[int, int], rank: int, like: Tensor
    ) -> tuple[Float[Tensor, "out_features rank"], Float[Tensor, "rank in_features"]]:
        """Return the parts of `B` and `A` that a layer uses, in the dtype and on the device of another tensor."""
        # Both have the spread of PEFT's `vera_B`, to the next power of two. What PEFT gives `vera_A` depends on the
        # widest layer.
        spread = 2.0 ** round(math.log2(6 / rank) / 2)
        left, right = (
            (drawn_rows(side, rank, 2 * self.projection_prng_key + which) * spread).to(like)
            for which, side in enumerate(shape)
        )
        return left, right.T


def _in_turn(
    left: Float[Tensor, "rows rank"],
    moment: Float[Tensor, "rank rank"],
    overlap: Float[Tensor, "rows rank"],
    inner: Float[Tensor, " rank"],
    total: float,
) -> tuple[float, Float[Tensor, " rows"], Float[Tensor, " rank"]]:
    """Solve for either vector in turn; return what the best round gains, and its vectors `b` and `d`.

    Args:
        left: `B`.
        moment: `K = A H A^T`.
        overlap: `G = E H A^T`.
        inner: the start `d`.
        total: the error without a correction.
    """
    # With V = B diag(d), row i of C = diag(b) V A gains 2 b_i <V_i, G_i> - b_i^2 <V_i, V_i K>: a regression of one
    # number. With V = diag(b) B the gain 2 <V diag(d), G> - <V diag(d), V diag(d) K> is quadratic in d, with the matrix
    # (V^T V) o K and the right-hand side diag(V^T G).
    best = -math.inf, overlap.new_zeros(len(left)), inner
    for _ in range(_ROUNDS):
        scaled = left * inner
        products = (scaled * overlap).sum(1)
        outputs = quotient(products, ((scaled @ moment) * scaled).sum(1))
        gain, before = (outputs @ products).item(), best[0]
        if gain > before:
            best = gain, outputs, inner
        if gain - before <= _LEAST_GAIN * (total - gain):
            break
        scaled = outputs[:, None] * left
        inner = semidefinite_solve((scaled.T @ scaled) * moment, (scaled * overlap).sum(0)[:, None])[:, 0]
    return best
