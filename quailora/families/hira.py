"""HiRA: every weight of the quantized layer is scaled, by numbers that form a low-rank matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import small_eigh, uniform
from ..core.metrics import Metric
from ..core.objective import Objective
from .adapter import Change, Parameters, check_rank_for
from .alternating import LEAST_GAIN, descend, drawn, leading_rows, of_one_size, trainable_factors
from .base import Family
from .linear import dense_metric
from .regression import base_in, base_of, each, inverses, outer_sums

_ROUNDS = 3  # a further one gains about two percent of the error in layers of SmolLM2
_STEPS = 3  # of conjugate gradients for the right factor in a round; the left one gets one
_LOUD = 8  # directions of the inputs whose correlations the preconditioner knows

_LEFT, _RIGHT = "hira_B", "hira_A"


@final
@dataclass(frozen=True)
class Hira(Family):
    """`C = Q o (hira_B @ hira_A)`, a product of entries (Huang et al., 2025, OpenReview TwJrTz9cRS).

    The error is a quadratic of either factor for a given other one. Both are improved in turn by conjugate gradients,
    from directions in which it falls fastest. A step costs a product of `Q o (hira_B @ hira_A)` with `H`.
    """

    name: ClassVar[str] = "hira"
    peft_type: ClassVar[str] = "HIRA"
    default_rank: ClassVar[int | None] = 32
    needs_base: ClassVar[bool] = True

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_rank_for(self, rank, min(shape), shape)
        return {_RIGHT: (rank, shape[1]), _LEFT: (shape[0], rank)}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        shapes = self.shapes(shape, rank)
        return {**drawn(shapes), _LEFT: torch.zeros(shapes[_LEFT])}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        base, error = base_in(self, objective), objective.error.double()
        problem = Weighted.of(base, objective.metric)
        # |E - Q o X|^2 = |E|^2 - 2 <X, T> + <X, Q o ((Q o X) H)> with T = Q o (E H). The first residual is T.
        weighted = objective.metric.product(error)
        target = left = base * weighted
        total, gain = (weighted * error).sum().item(), 0.0
        lora_B = error.new_zeros(len(error), rank)
        lora_A = leading_rows(lambda rows: (rows @ target.T) @ target, uniform((rank, error.shape[1]), error, seed=0))
        for round_ in range(_ROUNDS):
            lora_B, left = problem.better_left(lora_B, lora_A, left)
            before, gain = gain, ((target + left) * (lora_B @ lora_A)).sum().item()
            if round_ == _ROUNDS - 1 or gain - before <= LEAST_GAIN * (total - gain):
                break
            lora_A, left = problem.better_right(lora_B, lora_A, left)
        if not lora_B.any():
            return self.identity((error.shape[0], error.shape[1]), rank)
        factors = trainable_factors(lora_B, lora_A, rank)
        return of_one_size(dict(zip((_LEFT, _RIGHT), factors, strict=True)))

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        product = parameters[_LEFT] @ parameters[_RIGHT]
        return Change(product * base_of(self, base).to(product))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": sizes["r"]}  # PEFT's configuration has a rank_pattern, which its layers ignore


@final
@dataclass(frozen=True, eq=False)
class Weighted:
    """The quadratic `<X, Q o ((Q o X) H)>`, and what the preconditioners know of it.

    Attributes:
        base: `Q`.
        metric: `H`.
        loud: rows `F`, whose `F^T F` is the loudest part of `H`.
        quiet: the diagonal of the rest.
    """

    base: Float[Tensor, "rows columns"]
    metric: Metric
    loud: Float[Tensor, "few columns"]
    quiet: Float[Tensor, " columns"]

    @classmethod
    def of(cls, base: Float[Tensor, "rows columns"], metric: Metric) -> Weighted:
        """Return the quadratic of a layer."""
        width = base.shape[1]
        rows = leading_rows(metric.product, uniform((min(_LOUD, width), width), base, seed=0))
        # Of H = L L^T the orthonormal rows V see H V^T (V H V^T)^-1 V H: a projection of L, so that a rest is left.
        seen = metric.product(rows)
        values, vectors = small_eigh(seen @ rows.T)
        kept = values > 1e-9 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
        loud = (vectors[:, kept] / values[kept].sqrt()).T @ seen
        powers = dense_metric(metric, base).diagonal()
        return cls(base, metric, loud, (powers - loud.square().sum(0)).clamp(min=0) + 1e-9 * powers.mean())

    def image(self, change: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return half the gradient of the quadratic."""
        return self.base * self.metric.product((self.base * change).float()).double()

    def better_left(self, left: Tensor, right: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return a better left factor and what it leaves: one small system a row, whose matrix is nearly known."""
        seen = (self.base @ (right[:, None] * self.loud).flatten(0, 1).T).view(len(left), len(right), -1)
        blocks = seen @ seen.mT + outer_sums(self.base.square() * self.quiet, right.T)
        inverse = inverses(blocks)
        return descend(
            left,
            residual,
            lambda rows: self.image(rows @ right),
            lambda full: full @ right.T,
            lambda rows: each(inverse, rows),
            1,
        )

    def better_right(self, left: Tensor, right: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return a better right factor and what it leaves; the preconditioner takes each column by itself."""
        powers = self.quiet + self.loud.square().sum(0)
        inverse = inverses(outer_sums(powers[:, None] * self.base.T.square(), left))
        return descend(
            right,
            residual,
            lambda columns: self.image(left @ columns),
            lambda full: left.T @ full,
            lambda columns: each(inverse, columns.T).T,
            _STEPS,
        )
