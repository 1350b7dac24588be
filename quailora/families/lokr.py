"""LoKr: a Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import uniform
from ..core.objective import Objective
from ..errors import ConfigurationError, TargetError
from .adapter import Change, Parameters
from .alternating import LEAST_GAIN, divided, drawn, leading_rows, of_one_size, trainable_factors
from .base import Family
from .linear import dense_metric
from .regression import low_rank_regression

_ROUNDS = 30  # at most; layers of SmolLM2 need about ten


@final
@dataclass(frozen=True)
class LoKr(Family):
    """`C = kron(w1, w2)` (Yeh et al., 2023, arXiv 2309.14859).

    The error is a quadratic of `w1` for a given `w2`, and the other way round: both are solved in turn, each exactly,
    also where its rank is limited. The start is the nearest Kronecker product of `E H` (Van Loan and Pitsianis, 1993),
    the direction in which the error falls fastest. Stock PEFT cannot make the layers on a base of packed 4-bit weights.

    Attributes:
        decompose_both: `w1` has two factors as well, where the rank is below half its longer side.
        decompose_factor: sides of `w1`; the divisor nearest to the root of each side of the layer by default.
    """

    name: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"
    default_rank: ClassVar[int | None] = 8
    scales: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "int8", "torchao"})

    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigurationError(f"Expected a decompose_factor of -1 or at least 1, got {self.decompose_factor}.")

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        if rank < 1:
            raise TargetError(f"Expected a rank of at least 1 for lokr, got {rank}.")
        first, second = zip(*(factors_of(side, self.decompose_factor) for side in shape), strict=True)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns), may_split in (("w1", first, self.decompose_both), ("w2", second, True)):
            split = may_split and 2 * rank < max(rows, columns)
            parts = {"_a": (rows, rank), "_b": (rank, columns)} if split else {"": (rows, columns)}
            shapes |= {f"lokr_{name}{end}": size for end, size in parts.items()}
        return shapes

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        shapes = self.shapes(shape, rank)
        first = next(iter(shapes))  # the others get a gradient as soon as it is not zero
        return {**drawn(shapes), first: torch.zeros(shapes[first])}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        error = objective.error.double()
        shapes = self.shapes((error.shape[0], error.shape[1]), rank)
        (a, b), (c, d) = (factors_of(side, self.decompose_factor) for side in error.shape)
        # Row (i, j) and column (k, l) of a rearranged matrix have the entry at row (i, k) and column (j, l): there
        # kron(w1, w2) is the product of w1 as a column and w2 as a row.
        products = objective.metric.product(error)
        weighted = rearranged(products, (a, b), (c, d))
        moment = rearranged(dense_metric(objective.metric, error), (c, d), (c, d))
        # |E - kron(w1, w2)|^2 is for a given w1 a quadratic of w2: w2 G = R with R = w1 . E H, and G = (w1^T w1) . H.
        limits = {name: rank if f"lokr_{name}_a" in shapes else None for name in ("w1", "w2")}
        start = leading_rows(lambda rows: (rows @ weighted) @ weighted.T, uniform((1, a * c), error, seed=0))
        first, total, gain = start.view(a, c), (products * error).sum().item(), 0.0
        for _ in range(_ROUNDS):
            right = (first.flatten() @ weighted).view(b, d)
            second = low_rank_regression(right, ((first.T @ first).flatten() @ moment).view(d, d), limits["w2"])
            right = (weighted @ second.flatten()).view(a, c)
            first = low_rank_regression(right, (moment @ (second.T @ second).flatten()).view(c, c), limits["w1"])
            before, gain = gain, (first * right).sum().item()
            if gain - before <= LEAST_GAIN * (total - gain):
                break
        if gain <= 0:
            return self.identity((a * b, c * d), rank)
        found: dict[str, Tensor] = {}
        for name, matrix in (("w1", first), ("w2", second)):
            if limits[name] is None:
                found[f"lokr_{name}"] = matrix
            else:
                side = torch.eye(min(matrix.shape)).to(matrix)
                pair = (matrix, side) if len(matrix) > len(side) else (side, matrix)
                found[f"lokr_{name}_a"], found[f"lokr_{name}_b"] = trainable_factors(*pair, rank)
        return of_one_size(found)

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        first, second = (
            parameters[f"lokr_{name}"]
            if f"lokr_{name}" in parameters
            else parameters[f"lokr_{name}_a"] @ parameters[f"lokr_{name}_b"]
            for name in ("w1", "w2")
        )
        return Change(torch.kron(first, second.contiguous()))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: sizes[name] for name in ("r", "rank_pattern", "alpha_pattern")}
        own = {"decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor}
        return {**kept, "alpha": sizes["lora_alpha"], **own}

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return alpha / rank

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return divided(parameters, scale)


def factors_of(side: int, factor: int = -1) -> tuple[int, int]:
    """Return two numbers whose product is the side of a layer, as PEFT chooses them.

    Args:
        side: the side.
        factor: the first number if it divides the side; else a limit of it beside the root of the side; none if -1.
    """
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    limit = math.isqrt(side) if factor < 0 else min(factor, math.isqrt(side))
    first = next(number for number in range(limit, 0, -1) if side % number == 0)
    return first, side // first


def rearranged(
    matrix: Float[Tensor, "rows columns"], rows: tuple[int, int], columns: tuple[int, int]
) -> Float[Tensor, "left right"]:
    """Return a matrix with a row for each block and a column for each place in a block."""
    return matrix.view(*rows, *columns).transpose(1, 2).reshape(rows[0] * columns[0], -1)
