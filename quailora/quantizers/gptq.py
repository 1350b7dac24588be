"""Rounding with error feedback: GPTQ (Frantar et al., 2022, arXiv 2210.17323)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..linalg import safe_cholesky
from ..metrics import Gram, check_damping
from ..statistics import InputStatistics
from .base import Quantizer
from .grid import Grid, GridWeight, check_bits_and_group, consecutive_groups, split_groups
from .uniform import Uniform

BLOCK = 128
"""Columns between two updates of all the rest, at most."""

Matrix = Float[Tensor, "out_features in_features"]


@final
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """2 to 8 bits: columns are rounded in turn, and those still to come are shifted to make up for the error made.

    Works on `H = mean(x x^T)` of the layer's inputs, damped. If the sweep ends worse than rounding to nearest on the
    same grid, in the metric of `H`, the latter is returned (this happens on degenerate statistics).

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale; None for one scale a row.
        symmetric: fixed zero point `2^(bits-1)` instead of a stored one.
        activation_order: round the columns with the largest inputs first (`desc_act`).
        static_groups: with `activation_order`, keep groups of consecutive columns, with grids fitted beforehand.
        damping: added to the diagonal of `H`, relative to the `damping_scale` of that diagonal.
        damping_scale: "mean", as in the GPTQ papers' code, or "median". One massive activation can raise the mean of
            the diagonal a thousandfold, which then blurs every other channel; the median does not notice it.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    activation_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    damping_scale: Literal["mean", "median"] = "median"

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group_size)
        check_damping(self.damping)

    def encode(self, weight: Matrix, statistics: InputStatistics | None) -> GridWeight:  # noqa: D102
        assert statistics is not None  # `quantize` has checked it
        moment = statistics.second_moment.to(weight.device)
        group_size = self.group_size or weight.shape[1]
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.activation_order:
            order = moment.diagonal().argsort(descending=True, stable=True)
        working = weight.float()[:, order]
        factor = inverse_factor(moment[order][:, order], self._damping_of(moment)).float()

        static = None
        group_index = None
        if self.activation_order and self.static_groups:
            static = Grid.fit(split_groups(weight.float(), group_size), self.bits, self.symmetric)
        elif self.activation_order:
            group_index = torch.empty_like(order, dtype=torch.int32)
            group_index[order] = consecutive_groups(len(order), group_size, order.device).int()
        columns_static = None if static is None else static.at(order // group_size)
        codes, grid = sweep(working, factor, self.bits, self.symmetric, group_size, columns_static)

        result = GridWeight.store(
            codes[:, order.argsort()],
            grid if static is None else static,
            symmetric=self.symmetric,
            group_size=group_size,
            dtype=weight.dtype,
            group_index=group_index,
        )
        nearest = Uniform(self.bits, self.group_size, self.symmetric).encode(weight, None)
        metric = Gram(moment)
        return min(result, nearest, key=lambda candidate: metric.energy(weight.double() - candidate.dequantize().double()))

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None

    def _damping_of(self, moment: Float[Tensor, "in_features in_features"]) -> float:
        live = moment.diagonal()[moment.diagonal() > 0]
        if len(live) == 0:
            return 1.0
        return self.damping * (live.mean() if self.damping_scale == "mean" else live.median()).item()


def inverse_factor(
    moment: Float[Tensor, "in_features in_features"], damping: float
) -> Float[Tensor, "in_features in_features"]:
    """Return the upper triangular `U` with `U^T U = (H + damping * I)^-1`.

    With `J` the reversal of rows and columns and `J H J = L L^T`, the matrix `R = J L J` is upper triangular and
    `H = R R^T`, so `U = R^-1`: one Cholesky factorisation and one triangular inverse.
    """
    damped = moment.clone()
    damped.diagonal().add_(damping)
    root = safe_cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    factor: Tensor = torch.linalg.solve_triangular(root, identity, upper=True)
    return factor


def sweep(
    weight: Matrix,
    factor: Float[Tensor, "in_features in_features"],
    bits: int,
    symmetric: bool,
    group_size: int,
    static: Grid | None = None,
) -> tuple[Matrix, Grid]:
    """Round the columns of `weight` from left to right with error feedback.

    Updates to later columns are applied at once inside a block and in one product beyond it. Blocks end where groups
    end (or divide a group), so each group's grid is fitted to weights that all updates have reached.

    Args:
        weight: columns in the order of rounding; overwritten.
        factor: `U` of `inverse_factor`, in the same order.
        bits: width of a code.
        symmetric: as in `Grid.fit`.
        group_size: columns that share a scale.
        static: grid of each column; fitted on the way, one for each run of `group_size` columns, if it is missing.

    Returns:
        Codes, and the grid of each group (the static grid, if there is one).
    """
    block = group_size * (BLOCK // group_size) if group_size <= BLOCK else math.gcd(group_size, BLOCK)
    codes = torch.empty_like(weight)
    fitted: list[Grid] = []
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        scaled_errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            if static is None and column % group_size == 0:
                fitted.append(Grid.fit(weight[:, column : column + group_size], bits, symmetric))
            grid = fitted[-1] if static is None else static.at(_column(column, weight.device))
            value = weight[:, column].clone()
            code = grid.encode(value) if static is None else grid.encode(value[:, None])[:, 0]
            level = grid.decode(code) if static is None else grid.decode(code[:, None])[:, 0]
            codes[:, column] = code
            error = (value - level) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            scaled_errors[:, column - start] = error
        weight[:, stop:] -= scaled_errors @ factor[start:stop, stop:]
    if static is not None:
        return codes, static
    return codes, Grid(torch.stack([g.scale for g in fitted], 1), torch.stack([g.zero_point for g in fitted], 1), bits)


def _column(column: int, device: torch.device) -> Int[Tensor, " 1"]:
    return torch.tensor([column], device=device)
