"""What families share that are found by regressions, or that multiply the quantized weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import small_eigh
from ..core.objective import Objective
from ..errors import ConfigurationError, NumericalError
from .base import Family

_RIDGE = 1e-10  # of the diagonal, for directions that the inputs do not have
_ROUGH = 1e-6  # the same for preconditioners, which meet residuals in float32
_TRIES = 5  # ridges, each a hundred times larger


def base_of(family: Family, base: Tensor | None) -> Float[Tensor, "out_features in_features"]:
    """Return `Q`, which the caller has to know.

    Raises:
        ConfigurationError: if it was not given.
    """
    if base is None:
        raise ConfigurationError(
            f"The change that {family.name or repr(family)} makes depends on the quantized weight, which was not given."
        )
    return base


def base_in(family: Family, objective: Objective) -> Float[Tensor, "out_features in_features"]:
    """Return `Q` of an objective in float64."""
    return base_of(family, objective.base() if objective.base is not None else None).double()


def quotient(over: Float[Tensor, "*shape"], under: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the solution of each regression of one number, `over / under`; 0 where there is nothing to fit."""
    found = under > 0
    return torch.where(found, over, 0) / torch.where(found, under, 1)


def semidefinite_solve(
    matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n k"], ridge: float = _RIDGE
) -> Float[Tensor, "*batch n k"]:
    """Return `X` with `matrix @ X = right`, for normal equations in float64, which may be singular.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        right: right-hand sides in the range of the matrix.
        ridge: share of the diagonal that is added to it; more where that is not enough.

    Raises:
        NumericalError: if the matrix is not finite, or far from semidefinite.
    """
    # With unit diagonal, D^-1/2 M D^-1/2, a ridge is small against every direction, however loud single inputs are.
    # Where the diagonal is zero, so are the row and the right-hand side, and the solution stays zero.
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    roots = torch.where(diagonal > 0, diagonal, 1).sqrt().unsqueeze(-1)
    scaled = (matrix / roots).div_(roots.mT)
    lifted = scaled.diagonal(dim1=-2, dim2=-1)
    lifted.add_(diagonal <= 0)
    for attempt in range(_TRIES):
        lifted.add_(ridge * 100**attempt)
        factor, info = torch.linalg.cholesky_ex(scaled)
        if not info.any():
            return torch.cholesky_solve(right / roots, factor) / roots
    raise NumericalError("Expected normal equations that are positive semidefinite; check that the inputs are finite.")


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
    free = semidefinite_solve(gram, right.T).T
    if rank is None or rank >= min(right.shape):
        return free
    square = free @ right.T
    leading = small_eigh((square + square.T) / 2)[1][:, -rank:]
    return leading @ (leading.T @ free)
