"""LoHa: the product of the entries of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import semidefinite_solve, uniform
from ..core.metrics import Metric
from ..core.objective import Objective
from .adapter import Change, Parameters, check_rank_for
from .alternating import LEAST_GAIN, descend, divided, drawn, of_one_size, trainable_factors
from .base import Family
from .linear import dense_metric
from .regression import each, inverses

_ROUNDS = 10  # further ones gain less than a hundredth of the error each in layers of SmolLM2
_SWEEPS, _STEPS = 3, 3  # in a round: over the left factors, and of conjugate gradients for each right factor

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

Quartic = Float[Tensor, "rank rank rank rank"]


@final
@dataclass(frozen=True)
class LoHa(Family):
    """`C = (hada_w1_a @ hada_w1_b) o (hada_w2_a @ hada_w2_b)`, a product of entries (Hyeon-Woo et al., 2021).

    (arXiv 2108.06098.) That is `C = Y Z` with `rank^2` directions. A row of `Y` has the products of any number in that
    row of the one left factor with any in that of the other, and `Z` likewise those of the right factors. The error is
    a quadratic of each of the four factors, and they are solved for in turn. The start is the best correction of plain
    LoRA of the same rank, so that the result is not worse than that. Stock PEFT cannot make the layers on packed 4-bit
    weights.
    """

    name: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"
    default_rank: ClassVar[int | None] = 8
    scales: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "int8", "torchao"})

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_rank_for(self, rank, min(shape), shape)
        return dict(zip(_NAMES, 2 * ((shape[0], rank), (rank, shape[1])), strict=True))

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        return {
            **drawn(self.shapes(shape, rank)),
            "hada_w2_b": torch.zeros(rank, shape[1]),
        }  # as in PEFT: one zero, which has a gradient

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        error, metric = objective.error.double(), objective.metric
        weighted, powers = metric.product(error), dense_metric(metric, error).diagonal()
        total, gain = (weighted * error).sum().item(), 0.0
        start = objective.projection(objective.subspace(rank))
        if not start.lora_A.any():
            return self.identity((error.shape[0], error.shape[1]), rank)
        # Beside the correction of plain LoRA stand ones. The further directions beside it take no part yet.
        first = trainable_factors(start.lora_B.double(), start.lora_A.double(), rank)
        lefts, rights = [first[0], torch.zeros_like(first[0])], [first[1], uniform(first[1].shape, first[1], seed=1)]
        lefts[1][:, 0], rights[1][0] = 1, 1
        for round_ in range(_ROUNDS):
            # |E - Y Z|^2 = |E|^2 - 2 <Y, E H Z^T> + <Y, Y (Z H Z^T)>: one small problem for each row of Y.
            products = (rights[0][:, None] * rights[1]).flatten(0, 1)
            seen = metric.product(products)
            moment, overlap = (seen @ products.T).view(4 * (rank,)), (error @ seen.T).view(-1, rank, rank)
            for _ in range(_SWEEPS):
                lefts[1] = rows_given(lefts[0], turned(moment), overlap.mT)
                lefts[0] = rows_given(lefts[1], moment, overlap)
            outer = (lefts[0][:, :, None] * lefts[1][:, None]).flatten(1)
            before, gain = gain, (outer * overlap.flatten(1)).sum().item()
            if round_ == _ROUNDS - 1 or gain - before <= LEAST_GAIN * (total - gain):
                break
            # The same in Z is -2 <Z, Y^T E H> + <Z, (Y^T Y) Z H>, where H couples the columns.
            square, target = outer.T @ outer, outer.T @ weighted
            left = (target - square @ seen).view(rank, rank, -1)
            square = square.view(4 * (rank,))
            rights[0], left = columns_given(rights, square, left, metric, powers)
            rights[1], _ = columns_given(rights[::-1], turned(square), left.transpose(0, 1), metric, powers)
        lefts[1][~lefts[0].any(1), 0] = 1  # else an output without an error could not be trained
        pairs = (trainable_factors(left, right, rank) for left, right in zip(lefts, rights, strict=True))
        return of_one_size(dict(zip(_NAMES, (part for pair in pairs for part in pair), strict=True)))

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        first, others, second, rest = (parameters[name] for name in _NAMES)
        return Change((first @ others) * (second @ rest))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: sizes[name] for name in ("r", "rank_pattern", "alpha_pattern")}
        return {**kept, "alpha": sizes["lora_alpha"]}

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return alpha / rank

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return divided(parameters, scale)


def turned(quartic: Quartic) -> Quartic:
    """Return the numbers that belong to products of two factors for the factors in the other order."""
    return quartic.permute(1, 0, 3, 2)


def blocks_of(other: Float[Tensor, "count rank"], quartic: Quartic) -> Float[Tensor, "count rank rank"]:
    """Return for each vector `v` of a factor `sum_pq v_p v_q K_sptq`: the quadratic that its partner is left with."""
    rank = other.shape[1]
    pairs = (other[:, :, None] * other[:, None]).flatten(1)
    return (pairs @ quartic.permute(1, 3, 0, 2).reshape(rank**2, rank**2)).view(-1, rank, rank)


def rows_given(
    other: Float[Tensor, "rows rank"], moment: Quartic, overlap: Float[Tensor, "rows rank rank"]
) -> Float[Tensor, "rows rank"]:
    """Return the best left factor, given the other one: a regression for each row."""
    right = (overlap * other[:, None]).sum(2)
    return semidefinite_solve(blocks_of(other, moment), right[:, :, None])[:, :, 0]


def columns_given(
    rights: list[Tensor], square: Quartic, left: Tensor, metric: Metric, powers: Float[Tensor, " columns"]
) -> tuple[Float[Tensor, "rank columns"], Tensor]:
    """Return a better first one of the right factors, given the other one, and what it leaves of `Y^T (E - Y Z) H`."""
    (found, other), rank = rights, len(rights[0])
    # Without the correlations of inputs each column is solved by itself: that is the preconditioner. Products with H
    # are in float32 here, since they only choose the steps of one round.
    inverse = inverses(blocks_of(other.T, square) * powers[:, None, None])

    def apply(factor: Tensor) -> Tensor:
        seen = metric.product((factor[:, None] * other).flatten(0, 1).float()).double()
        return (square.reshape(rank**2, -1) @ seen).view(rank, rank, -1)

    return descend(
        found, left, apply, lambda full: (full * other).sum(1), lambda right: each(inverse, right.T).T, _STEPS
    )
