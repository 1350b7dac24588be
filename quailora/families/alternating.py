"""What families share whose factors are improved in turn, each for the others as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import product_svd, uniform

LEAST_GAIN = 1e-3
"""Share of the error: a round that gains less is the last one."""

_POWERS = 4  # steps of the power method, which only has to find a start


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return random factors, each uniform in `+-1/sqrt(columns)`, as in PEFT's own start."""
    return {
        name: uniform(shape, torch.empty(0), seed=number) / math.sqrt(shape[1])
        for number, (name, shape) in enumerate(shapes.items())
    }


def divided(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the factors of a product, divided so that the product is divided by a scale."""
    root = scale ** (1 / len(parameters))
    return {name: (tensor.double() / root).float() for name, tensor in parameters.items()}


def leading_rows(
    apply: Callable[[Float[Tensor, "rank columns"]], Float[Tensor, "rank columns"]],
    start: Float[Tensor, "rank columns"],
) -> Float[Tensor, "rank columns"]:
    """Return roughly the leading eigenvectors of a positive semidefinite matrix, orthonormal.

    Args:
        apply: returns rows times the matrix.
        start: as many random rows.
    """
    rows = start
    for _ in range(_POWERS):
        rows = torch.linalg.qr(apply(rows).T).Q.T
    return rows


def trainable_factors(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"], rank: int
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """Return balanced factors of the product of two, every direction of which can be trained.

    Args:
        left: left factor, not wider than it is long.
        right: right factor, not longer than it is wide.
        rank: number of directions, at least the rank of the product.
    """
    # A direction that the product does not have starts as in plain LoRA: zero on one side alone.
    rows, columns = len(left), right.shape[1]
    basis, singular, others = product_svd(left, right)
    alive = int((singular[:rank] > 8 * torch.finfo(torch.float32).eps * singular[0]).sum())
    roots = singular[:alive].sqrt()
    first = left.new_zeros(rows, rank)
    second = uniform((rank, columns), right, seed=0) / math.sqrt(columns)
    first[:, :alive] = basis[:, :alive] * roots
    second[:alive] = roots[:, None] * others[:alive]
    return first, second


def of_one_size(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a product, scaled so that all have the same norm; as they are if the product is zero."""
    size = math.prod(part.norm().item() ** (1 / len(parts)) for part in parts.values())
    if not size:
        return dict(parts)
    return {name: part * (size / part.norm()) for name, part in parts.items()}


def descend(
    found: Tensor,
    residual: Tensor,
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Return a better solution of `adjoint(right - apply(X)) = 0`, and what is left of `right` there.

    By conjugate gradients, none of whose steps raises the error.

    Args:
        found: the solution to go on from.
        residual: `right - apply(found)`.
        apply: linear.
        adjoint: linear, so that `adjoint(apply(X))` is symmetric and positive semidefinite.
        inverse: about the inverse of that, of the same kind.
        steps: how many.
    """
    direction, before = torch.zeros_like(found), math.inf
    for _ in range(steps):
        gradient = adjoint(residual)
        step = inverse(gradient)
        promise = (gradient * step).sum().item()
        direction = step + promise / before * direction
        image = apply(direction)
        curvature = (direction * adjoint(image)).sum().item()
        if not (promise > 0 and curvature > 0):  # nothing is left to gain
            break
        found, residual = found + promise / curvature * direction, residual - promise / curvature * image
        before = promise
    return found, residual
