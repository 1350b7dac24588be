"""Rounding with error feedback: GPTQ (Frantar et al., 2022, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..linalg import safe_cholesky, triangular_inverse
from ..metrics import METRICS, check_damping
from ..statistics import InputStatistics
from .base import Quantizer
from .grid import Grid, GridWeight, check_bits_and_group, consecutive_groups, split_groups
from .uniform import nearest

_TIE = 1e-4  # share of the loss by which the sweep has to be better than rounding to nearest, against float32's errors

BLOCK, STRETCH = 128, 32
"""Columns that get feedback before all the rest do, and at once, at most."""

Matrix = Float[Tensor, "out_features in_features"]
Square = Float[Tensor, "in_features in_features"]


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
        group_size = self.group_size or weight.shape[1]
        statistics = statistics.to(weight.device)
        moment = statistics.second_moment
        damping, order, factor = statistics.once((GPTQ, self._factor_key), lambda: self._factor(moment))
        full = weight.to(torch.promote_types(weight.dtype, torch.float32))
        columns = full.float().T
        columns = columns.clone(memory_format=torch.contiguous_format) if order is None else columns[order]

        static, columns_static = None, None
        group_index = None
        if order is not None and self.static_groups:
            static = Grid.fit(split_groups(full.float(), group_size), self.bits, self.symmetric)
            columns_static = static.at(order // group_size)
        elif order is not None:
            group_index = torch.empty_like(order, dtype=torch.int32)
            group_index[order] = consecutive_groups(len(order), group_size, order.device).int()
        codes, grid, loss = sweep(columns, factor, self.bits, self.symmetric, group_size, columns_static)

        result = GridWeight.store(
            codes.T if order is None else codes.T[:, order.argsort()],
            grid if static is None else static,
            symmetric=self.symmetric,
            group_size=group_size,
            dtype=weight.dtype,
            group_index=group_index,
        )

        # The loss is that of the damped metric. Near a tie, rounding to nearest is as good, and certain to be.
        plain, plain_grid = nearest(full.float(), self.bits, self.symmetric, group_size)
        plain_energy = METRICS["gram"](statistics).energy(full - plain_grid.decode_groups(plain, group_size))
        energy = loss - damping * (full - result.dequantize()).square().sum(dtype=torch.float64).item()
        if energy + _TIE * loss < plain_energy:
            return result
        return GridWeight.store(
            plain, plain_grid, symmetric=self.symmetric, group_size=group_size, dtype=weight.dtype
        )

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None

    @property
    def _factor_key(self) -> tuple[object, ...]:
        return self.activation_order, self.damping, self.damping_scale

    def _factor(self, moment: Square) -> tuple[float, Int[Tensor, " in_features"] | None, Square]:
        """Return the damping, the order of rounding (None: left to right), and `inverse_factor` in that order."""
        power = moment.diagonal()
        live = power[power > 0]
        damping = 1.0
        if len(live):
            damping = self.damping * (live.mean() if self.damping_scale == "mean" else live.median()).item()
        if not self.activation_order:
            return damping, None, inverse_factor(moment, damping)
        order = power.argsort(descending=True, stable=True)
        return damping, order, inverse_factor(moment[order][:, order], damping)


def inverse_factor(moment: Square, damping: float) -> Square:
    """Return the upper triangular `U` with `U^T U = (H + damping * I)^-1`, in float32.

    With `J` the reversal of rows and columns and `J H J = L L^T`, the matrix `R = J L J` is upper triangular and
    `H = R R^T`, so `U = R^-1`: one Cholesky factorisation, in float64 because a massive channel makes `H` nearly
    singular against its largest entry, and one triangular inverse.
    """
    damped = moment.flip(0, 1)
    damped.diagonal().add_(damping)
    return triangular_inverse(safe_cholesky(damped).float()).flip(0, 1)


def sweep(
    columns: Float[Tensor, "in_features out_features"],
    factor: Square,
    bits: int,
    symmetric: bool,
    group_size: int,
    static: Grid | None = None,
) -> tuple[Float[Tensor, "in_features out_features"], Grid, float]:
    """Round columns of a weight in turn, with error feedback to those that follow.

    Feedback is given at three ranges: at once up to the end of a short stretch, by one product to the end of the block
    when the stretch ends, and by one product to all the rest when the block ends. Stretches and blocks end where groups
    end (or divide a group), so each group's grid is fitted to weights that all feedback has reached.

    Args:
        columns: the transposed weight, in the order of rounding; overwritten.
        factor: `U` of `inverse_factor`, in the same order.
        bits: width of a code.
        symmetric: as in `Grid.fit`.
        group_size: columns that share a scale.
        static: grid of each column; fitted on the way, one for each run of `group_size` columns, if it is missing.

    Returns:
        Codes, transposed as the weight; the grid of each group (the static grid, if there is one); and the loss
        `tr(E (H + damping * I) E^T)` of what rounding has done.
    """
    count = len(columns)
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales = factor.diagonal().tolist()
    fitted: list[Grid] = []
    run = 1 if static is not None or group_size >= count else group_size  # whose grids are fitted on the way
    for start, stop in cut(0, count, run, BLOCK):
        for first, last in cut(start, stop, run, STRETCH):
            for column in range(first, last):
                value = columns[column]
                if static is None and column % group_size == 0:
                    fitted.append(Grid.fit(columns[column : column + group_size].T, bits, symmetric))
                grid = fitted[-1] if static is None else static.column(column)
                codes[column] = code = grid.encode(value)
                errors[column] = error = (value - grid.decode(code)) / scales[column]
                columns[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
            columns[last:stop].addmm_(factor[first:last, last:stop].T, errors[first:last], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    loss = errors.square().sum(dtype=torch.float64).item()  # the errors are E U^-1
    if static is not None:
        return codes, static, loss
    return codes, Grid(torch.stack([g.scale for g in fitted], 1), torch.stack([g.zero_point for g in fitted], 1), bits), loss


def cut(start: int, stop: int, run: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of at most `limit` that are whole runs, or divide a run."""
    width = run * (limit // run) or next(width for width in range(limit, 0, -1) if run % width == 0)
    for first in range(start, stop, width):
        yield first, min(first + width, stop)
