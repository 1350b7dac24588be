"""What families share whose change is linear in their parameters: their best parameters solve linear equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.linalg import scaled_cholesky
from ..core.metrics import Diagonal, Gram, Metric, Shrunk
from ..core.objective import Objective

_ROUNDS = 60
_SOLVED = 1e-10  # share of the first step's promise at which the equations count as solved
_LEAST_GAIN = 1e-3  # of what is left, and of what all rounds have gained: a round that gains less is the last one
_WIDTH = 128  # parameters that are solved for together at most, which bounds the memory


def least_squares(
    objective: Objective,
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the parameters `p` with the least `tr((E - A p) H (E - A p)^T)`, for a linear `A`, in float64.

    Conjugate gradients on the equations `A^T (A p H) = A^T (E H)`. `H` and `A` may be singular: from zero the iteration
    stays in the directions that change the error. A round costs one product with `H` and one with `A` and `A^T` each.

    Args:
        objective: `E` and `H`.
        apply: `A`, which makes a correction of parameters of any shape.
        adjoint: `A^T`, which makes parameters of a matrix as large as the correction.
        inverse: preconditions: a symmetric, positive definite approximation of the inverse of `p -> A^T (A p H)`. If
            it is exact, one round is enough.
    """
    error = objective.error.double()
    weighted = objective.metric.product(error)
    left, residual = _inner(weighted, error), adjoint(weighted)
    found, direction = torch.zeros_like(residual), torch.zeros_like(residual)
    first, before, gained = 0.0, math.inf, 0.0
    for _ in range(_ROUNDS):
        # <r, z> is what the error would fall by if the preconditioner were exact. With the step length
        # <r, z> / <d, N d> along a direction d it falls by <r, z>^2 / <d, N d>.
        step = residual if inverse is None else inverse(residual)
        promise = _inner(residual, step)
        first = first or promise
        if not promise > _SOLVED * first:
            break
        direction = step + promise / before * direction
        image = adjoint(objective.metric.product(apply(direction)))
        curvature = _inner(direction, image)
        if not curvature > 0:  # by rounding, where nothing is left to gain
            break
        length = promise / curvature
        found, residual = found + length * direction, residual - length * image
        gained, left, before = gained + length * promise, left - length * promise, promise
        if length * promise < _LEAST_GAIN * min(gained, left):
            break
    return found


def _inner(left: Tensor, right: Tensor) -> float:
    return (left * right).sum().item()


def block_inverse(
    groups: Int[Tensor, " count"], blocks: Callable[[Int[Tensor, "parts width"]], Float[Tensor, "parts width width"]]
) -> Callable[[Float[Tensor, " count"]], Float[Tensor, " count"]]:
    """Return a preconditioner that solves the equations of each group of parameters as if there were no others.

    Args:
        groups: the group of each parameter. A large group is cut into equal parts.
        blocks: returns a block of the equations' matrix for each row of a table, which has the numbers of parameters of
            one group.
    """
    # Parameters in the order of their groups, with the place of each in its group, then in the part of its group.
    order = torch.argsort(groups, stable=True)
    _, where, sizes = torch.unique_consecutive(groups[order], return_inverse=True, return_counts=True)
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[where]
    parts = (sizes + _WIDTH - 1) // _WIDTH
    part = (parts.cumsum(0) - parts)[where] + place % parts[where]
    place //= parts[where]
    # A table with one row a part, filled up with a parameter that is no one's, whose equations are those of identity.
    table = order.new_full((int(parts.sum()), int(place.max()) + 1), len(order))
    table[part, place] = order
    held = table < len(order)
    matrices = torch.where(held[:, :, None] & held[:, None], blocks(torch.where(held, table, table[:, :1])), 0.0)
    matrices.diagonal(dim1=1, dim2=2).masked_fill_(~held, 1.0)
    root, factors = scaled_cholesky(matrices)

    def inverse(residual: Tensor) -> Tensor:
        right = torch.cat([residual, residual.new_zeros(1)])[table] * root
        solved = torch.cholesky_solve(right[:, :, None], factors)[:, :, 0] * root
        return torch.empty_like(residual).index_put((table[held],), solved[held])

    return inverse


def dense_metric(metric: Metric, like: Float[Tensor, "rows width"]) -> Float[Tensor, "width width"]:
    """Return `H` itself, in float64; without a product of two square matrices for the usual metrics.

    Args:
        metric: `H`.
        like: a matrix with as many columns, on the device of the result.
    """
    if isinstance(metric, Gram):
        return metric.second_moment.double()
    if isinstance(metric, Shrunk):
        inner = dense_metric(metric.inner, like)
        return torch.lerp(inner, dense_metric(metric.diagonal, like), metric.share)
    if isinstance(metric, Diagonal):
        return metric.second_moment.double().diag()
    return metric.product(torch.eye(like.shape[1], dtype=torch.float64, device=like.device))
