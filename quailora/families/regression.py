"""What families share that are found by regressions, or that multiply the quantized weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import semidefinite_solve, small_eigh
from ..core.objective import Objective
from ..errors import ConfigurationError
from .base import Family

_CALM = 1e-8  # of the diagonal, for factors that are solved for in turn: with less they grow, and cancel each other
_ROUGH = 1e-6  # of the diagonal, for preconditioners, which meet residuals in float32


def base_of(family: Family, base: Tensor | None) -> Float[Tensor, "out_features in_features"]:
    """Return `Q`, which the caller has to know.

    Raises:
        ConfigurationError: if it was not given.
    """
    if base is None:
        raise ConfigurationError(
            f"The change that {family.title} makes depends on the quantized weight, which was not given."
        )
    return base


def base_in(family: Family, objective: Objective) -> Float[Tensor, "out_features in_features"]:
    """Return `Q` of an objective in float64."""
    return base_of(family, objective.base() if objective.base is not None else None).double()


def quotient(over: Float[Tensor, "*shape"], under: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the solution of each regression of one number, `over / under`; 0 where there is nothing to fit."""
    found = under > 0
    return torch.where(found, over, 0) / torch.where(found, under, 1)


def inverses(blocks: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return about the inverse of each matrix, which may be singular, for use as a preconditioner."""
    return semidefinite_solve(blocks, torch.eye(blocks.shape[-1]).to(blocks).expand_as(blocks), _ROUGH)


def each(matrices: Float[Tensor, "count n n"], vectors: Float[Tensor, "count n"]) -> Float[Tensor, "count n"]:
    """Return the product of each matrix with its vector."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


def outer_sums(
    weights: Float[Tensor, "count rows"], vectors: Float[Tensor, "rows rank"]
) -> Float[Tensor, "count rank rank"]:
    """Return for each row of weights the sum of outer products of vectors with themselves, summed in float32."""
    pairs = (vectors[:, :, None] * vectors[:, None]).flatten(1)
    return (weights.float() @ pairs.float()).to(vectors).view(len(weights), vectors.shape[1], -1)


def low_rank_regression(
    right: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"], rank: int | None = None
) -> Float[Tensor, "rows n"]:
    """Return the matrix `X` of a rank with the least `tr(X G X^T) - 2 tr(X R^T)`; of any rank if None.

    Args:
        right: `R`, in float64.
        gram: `G`, positive semidefinite.
        rank: limit of the rank.
    """
    # With F = R G^-1 this is tr((F - X) G (F - X)^T) up to a constant, so that X = U U^T F for the leading eigenvectors
    # U of F G F^T = F R^T.
    free = semidefinite_solve(gram, right.T, _CALM).T
    if rank is None or rank >= min(right.shape):
        return free
    square = free @ right.T
    leading = small_eigh((square + square.T) / 2)[1][:, -rank:]
    return leading @ (leading.T @ free)
