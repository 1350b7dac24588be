"""Two scalings of random projections, each solved for with the other one given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import semidefinite_solve

_STEPS = 15
_LEAST_GAIN = 1e-2  # of the error: a step that promises less is left to the next round


@final
@dataclass(frozen=True, eq=False)
class Equations:
    """The gain `2 <U, R> - <U, J U G>` of `U = diag(lambda) (A o gamma)`, which is quadratic in either scaling.

    `A o gamma` has a row for each row of `A` and each row of gamma, in this order, which is the product of the two.

    Attributes:
        small: `A`.
        moment: `J`, positive semidefinite.
        right: `R`.
        side: `G`, positive semidefinite; None for the identity.
    """

    small: Float[Tensor, "rank shorter"]
    moment: Float[Tensor, "products products"]
    right: Float[Tensor, "products shorter"]
    side: Float[Tensor, "shorter shorter"] | None

    def best_lambda(self, gamma: Float[Tensor, "bases shorter"]) -> tuple[Float[Tensor, "rank bases"], float]:
        """Return lambda for a given gamma, and what both gain."""
        # With T = A o gamma the matrix of the equations is J o (T G T^T), and the right-hand side diag(R T^T).
        rows = (self.small[:, None] * gamma).flatten(0, 1)
        overlap = (rows * self.right).sum(1, keepdim=True)
        found = semidefinite_solve(self.moment * (self._times_side(rows) @ rows.T), overlap)
        return found.reshape(len(self.small), len(gamma)), (found * overlap).sum().item()

    def best_gamma(
        self, scalings: Float[Tensor, "rank bases"], gamma: Float[Tensor, "bases shorter"], left: float
    ) -> Float[Tensor, "bases shorter"]:
        """Return gamma for a given lambda, by conjugate gradients.

        Args:
            scalings: lambda.
            gamma: where to start.
            left: the error there.
        """
        rows = scalings[:, :, None] * self.small[:, None]

        def normal(gamma: Tensor) -> Tensor:
            return _adjoint(rows, self._times_side(self.moment @ (rows * gamma).flatten(0, 1)))

        inverse = self._inverse(rows)
        residual = _adjoint(rows, self.right) - normal(gamma)
        direction, before = torch.zeros_like(gamma), math.inf
        for _ in range(_STEPS):
            step = inverse(residual)
            promise = (residual * step).sum().item()  # what the step would gain if the inverse were exact
            if not promise > _LEAST_GAIN * left:
                break
            direction = step + promise / before * direction
            image = normal(direction)
            curvature = (direction * image).sum().item()
            if not curvature > 0:  # by rounding, where nothing is left to gain
                break
            gamma, residual = gamma + promise / curvature * direction, residual - promise / curvature * image
            left, before = left - promise * promise / curvature, promise
        return gamma

    def _inverse(
        self, rows: Float[Tensor, "rank bases shorter"]
    ) -> Callable[[Float[Tensor, "bases shorter"]], Float[Tensor, "bases shorter"]]:
        """Return the inverse of the equations of gamma: the exact one if `G` is the identity, else one like it."""
        if self.side is None:
            # Columns of gamma have nothing to do with each other. The equations of column c have the matrix with
            # entries sum_uv rows_ujc J_ujvk rows_vkc for bases j and k.
            parts = self.moment.reshape(len(self.moment), *rows.shape[:2])
            blocks = [_adjoint(rows, parts[:, :, base] @ rows[:, base]) for base in range(rows.shape[1])]
            columns = torch.stack(blocks).permute(2, 0, 1)
            return lambda residual: semidefinite_solve(columns, residual.T[:, :, None])[:, :, 0].T
        # For a multiple of the identity in place of J, rows of gamma would have nothing to do with each other. All of
        # them get the mean of their matrices (rows^T rows) o G.
        flat = rows.flatten(0, 1)
        matrix = (flat.T @ flat) * self.side * (self.moment.diagonal().mean() / rows.shape[1])
        return lambda residual: semidefinite_solve(matrix[None], residual.T[None])[0].T

    def _times_side(self, matrix: Float[Tensor, "products shorter"]) -> Float[Tensor, "products shorter"]:
        return matrix if self.side is None else matrix @ self.side


def _adjoint(rows: Float[Tensor, "rank bases shorter"], matrix: Float[Tensor, "products shorter"]) -> Tensor:
    """Return for each base the sum over rows of `A`: the adjoint of `gamma -> rows * gamma`."""
    return (rows * matrix.reshape(rows.shape)).sum(0)
