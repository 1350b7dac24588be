"""Rounding with error feedback: GPTQ (Frantar et al., 2022, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from ..core.linalg import safe_cholesky, triangular_inverse
from ..core.metrics import SHRINKAGE, check_damping, check_shrinkage, gram
from ..core.statistics import InputStatistics
from ..errors import check_choice
from .base import QuantizedWeight, Quantizer
from .grid import Grid, GridWeight, check_bits_and_group
from .groups import consecutive_groups, split_groups
from .uniform import Uniform, nearest

_TIE = 1e-4  # share of the loss by which the sweep has to be better than rounding to nearest; float32 rounds off less

BLOCK, STRETCH = 128, 32
"""Largest number of columns in a block and in a stretch; see `sweep`."""

AnyWeight = TypeVar("AnyWeight", bound=QuantizedWeight)
Matrix = Float[Tensor, "out_features in_features"]
Square = Float[Tensor, "in_features in_features"]


@final
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """2 to 8 bits: columns are rounded in turn, and those still to come are shifted to make up for the error made.

    Works on `H = mean(x x^T)` of the layer's inputs, shrunk towards its diagonal and damped. Rounding to nearest with
    the same bits and group size, which fits a grid of its own, is tried as well, and is returned if its error in the
    metric `H` is smaller (this happens on degenerate statistics). The published method is `shrinkage=0`,
    `damping_scale="mean"`: it takes every correlation between channels as the calibration inputs show it, and can leave
    a worse model than rounding to nearest.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale; None for one scale a row.
        symmetric: fixed zero point `2^(bits-1)` instead of a stored one.
        activation_order: round the columns with the largest inputs first (`desc_act`).
        static_groups: with `activation_order`, keep groups of consecutive columns, with grids fitted beforehand.
        damping: added to the diagonal of `H`, relative to the `damping_scale` of that diagonal.
        damping_scale: "mean", as in the code of the GPTQ paper, or "median"; in both, channels that are always zero are
            left out. One massive activation can raise the mean of the diagonal a thousandfold. The damping can
            then exceed the power of the other channels and hide their correlations. The median hardly changes.
        mse: scales with the least squared error, in place of those that span the range of their group.
        shrinkage: share of the correlations between input channels that is taken off `H`, from 0 to below 1.
    """

    name: ClassVar[str] = "gptq"

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    activation_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    damping_scale: Literal["mean", "median"] = "median"
    mse: bool = False
    shrinkage: float = SHRINKAGE

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group_size)
        check_choice("a damping_scale", self.damping_scale, ("mean", "median"))
        check_damping(self.damping)
        check_shrinkage(self.shrinkage)

    @override
    def encode(self, weight: Matrix, statistics: InputStatistics | None) -> GridWeight:
        assert statistics is not None  # `quantize` has checked it
        group_size = self.group_size or weight.shape[1]
        statistics = statistics.to(weight.device)
        order, damping, factor = damped_factor(
            statistics, self.damping, self.damping_scale, self.shrinkage, activation_order=self.activation_order
        )
        full = weight.to(torch.promote_types(weight.dtype, torch.float32))
        columns = full.float().T
        columns = columns.clone(memory_format=torch.contiguous_format) if order is None else columns[order]

        grids: list[Grid] = []
        group_index = None
        # With static groups a grid is fitted to each run of consecutive columns before any is rounded. Otherwise it is
        # fitted when its first column is due, to weights that all feedback so far has shifted. Groups are then runs in
        # the order of rounding, and `group_index` says to which of them each column belongs.
        if order is not None and self.static_groups:
            grids.append(Grid.fit(split_groups(full.float(), group_size), self.bits, self.symmetric, self.mse))
            codes, loss = sweep(columns, factor, grids[0].at(order // group_size).column)
            grid = grids[0]
        else:

            def levels(column: int) -> Grid:
                if column % group_size == 0:
                    grids.append(Grid.fit(columns[column : column + group_size].T, self.bits, self.symmetric, self.mse))
                return grids[-1]

            codes, loss = sweep(columns, factor, levels, group_size)
            grid = Grid(
                torch.stack([each.scale for each in grids], 1),
                torch.stack([each.zero_point for each in grids], 1),
                self.bits,
            )
        if order is not None and not self.static_groups:
            group_index = torch.empty_like(order, dtype=torch.int32)
            group_index[order] = consecutive_groups(len(order), group_size, order.device).int()

        result = GridWeight.store(
            codes.T if order is None else codes.T[:, order.argsort()],
            grid,
            group_size=group_size,
            dtype=weight.dtype,
            group_index=group_index,
        )

        # The sweep knows its loss in the metric that it worked in, H' = (1 - s) H + s diag(H) + l I. With the squared
        # errors of each column, |E_j|^2, the energy in H itself follows without another product of the size of the
        # layer:
        #
        #     tr(E H E^T) = (tr(E H' E^T) - sum_j |E_j|^2 (s H_jj + l)) / (1 - s)
        #
        # It is a difference of two sums in float32, so the sweep has to be better than rounding to nearest by more than
        # their rounding. Where both are nearly equal, rounding to nearest is preferred, whose energy is known exactly.
        plain, plain_grid = nearest(full.float(), self.bits, self.symmetric, group_size, self.mse)
        plain_energy = gram(statistics).energy(full - plain_grid.decode_groups(plain, group_size))
        errors = (full - result.dequantize()).square().sum(0, dtype=torch.float64)
        added = errors @ (self.shrinkage * statistics.second_moment.diagonal() + damping)
        energy = (loss - added.item()) / (1 - self.shrinkage)
        if energy + _TIE * loss < plain_energy:
            return result
        return GridWeight.store(plain, plain_grid, group_size=group_size, dtype=weight.dtype)

    @override
    def with_feedback(self, damping: float | None = None) -> GPTQ:
        return self if damping is None else replace(self, damping=damping)

    @override
    def with_least_error(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.symmetric, mse=True)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


class Levels(Protocol):
    """What one column can be rounded to."""

    def encode(self, weight: Float[Tensor, " out_features"], /) -> Float[Tensor, " out_features"]:
        """Return the code of the nearest level, as an integer held in float32."""

    def decode(self, codes: Float[Tensor, " out_features"], /) -> Float[Tensor, " out_features"]:
        """Return the levels of codes."""


def damped_factor(
    statistics: InputStatistics,
    damping: float,
    scale: Literal["mean", "median"],
    shrinkage: float,
    *,
    activation_order: bool = False,
) -> tuple[Int[Tensor, " in_features"] | None, float, Square]:
    """Return the order of rounding (None: left to right), the damping, and `inverse_factor` in that order.

    Args:
        statistics: statistics of the layer's inputs; they keep the result for other layers with the same input.
        damping: relative to the `scale` of the diagonal of `H`.
        scale: kind of damping; see `damping_scale` of `GPTQ`.
        shrinkage: share of the correlations that is taken off; see `GPTQ`.
        activation_order: whether columns with the largest inputs come first.
    """

    def compute() -> tuple[Int[Tensor, " in_features"] | None, float, Square]:
        moment = statistics.second_moment
        power = moment.diagonal()
        # Channels that are always zero are left out of the median and of the mean, which they would pull down. Nothing
        # couples to them, and their own damping only has to be positive.
        live = power[power > 0]
        added = damping * (live.mean() if scale == "mean" else live.median()).item() if len(live) else 1.0
        if not activation_order:
            return None, added, inverse_factor(moment, added, shrinkage)
        order = power.argsort(descending=True, stable=True)
        return order, added, inverse_factor(moment[order][:, order], added, shrinkage)

    return statistics.cached((GPTQ, damping, scale, shrinkage, activation_order), compute)


def inverse_factor(moment: Square, damping: float, shrinkage: float) -> Square:
    """Return the upper triangular `U` of `(U^T U)^-1 = (1 - shrinkage) H + shrinkage diag(H) + damping I`, in float32.

    With `J` the reversal of rows and columns and `J H J = L L^T`, the matrix `R = J L J` is upper triangular and
    `H = R R^T`, so that `U = R^-1`, where `H` is the shrunk and damped matrix. This takes one Cholesky factorisation
    and one triangular inverse. The factorisation is in float64, because one massive channel makes all other eigenvalues
    tiny against the largest.
    """
    # In place on the flipped copy: off the diagonal H shrinks by the share, on it H stays and the damping is added.
    damped = moment.flip(0, 1)
    power = damped.diagonal() + damping
    damped.mul_(1 - shrinkage).diagonal().copy_(power)
    return triangular_inverse(safe_cholesky(damped).float()).flip(0, 1)


def sweep(
    columns: Float[Tensor, "in_features out_features"],
    factor: Square,
    levels: Callable[[int], Levels],
    run: int = 1,
) -> tuple[Float[Tensor, "in_features out_features"], float]:
    """Round columns of a weight in turn, with error feedback to those that follow.

    Feedback is given at three ranges. After each column it goes to the columns up to the end of a short stretch. At the
    end of a stretch, one product gives it to the rest of the block, and at the end of a block, one product gives it to
    all other columns. Stretches and blocks end where runs end, or divide a run into equal pieces. So when the
    levels of a run are fitted, all feedback from earlier columns has reached its columns.

    Args:
        columns: the transposed weight, in the order of rounding; overwritten.
        factor: `U` of `inverse_factor`, in the same order.
        levels: returns the levels of a column; called once for each column, in order.
        run: columns that levels are fitted to together.

    Returns:
        Codes, transposed like `columns`; and the loss `tr(E (U^T U)^-1 E^T)`, where `E` is the error of rounding.
    """
    # Let H be the shrunk and damped matrix here, R = U^-1, which is upper triangular, so that H = (U^T U)^-1 = R R^T,
    # and let E = W - Q be the error. Then
    #
    #     tr(E H E^T) = |E R|^2 = sum_j |e_j|^2,    e_j = sum_(i <= j) E_i R_ij
    #
    # where e_j depends on the columns up to j only. Columns are decided from left to right. For column j all earlier
    # E_i are known, and |e_j| is least if Q_j is the level nearest to
    #
    #     W_j + sum_(i < j) E_i R_ij / R_jj  =  W_j - sum_(i < j) e_i U_ij
    #
    # (both sides follow from E = e U, whose column j is E_j = sum_(i <= j) e_i U_ij, with U_jj = 1 / R_jj). With w_j
    # the right side, e_j = (w_j - Q_j) / U_jj. So once a column is rounded, its e_i times row i of U comes off all
    # columns to its right: this is the error feedback of GPTQ. For uniform levels, and as long as nothing is clipped,
    # it is Babai's nearest plane algorithm for the lattice of levels. The sum over i can be taken in any order and in
    # blocks. Only the columns that come next need it at once.
    count = len(columns)
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales = factor.diagonal().tolist()
    run = 1 if run >= count else run
    for start, stop in cut(0, count, run, BLOCK):
        for first, last in cut(start, stop, run, STRETCH):
            for column in range(first, last):
                value, level = columns[column], levels(column)
                codes[column] = code = level.encode(value)
                errors[column] = error = (value - level.decode(code)) / scales[column]
                columns[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
            columns[last:stop].addmm_(factor[first:last, last:stop].T, errors[first:last], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes, errors.square().sum(dtype=torch.float64).item()


def better_of(
    swept: AnyWeight, nearest: AnyWeight, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics
) -> AnyWeight:
    """Return what a sweep has found, or rounding to nearest if that is as good in the metric of `H` itself.

    Columns that are shifted can leave the range that scales cover which were fitted before. The metric of the sweep is
    damped, and does not show how much that costs.
    """
    metric, full = gram(statistics), weight.float()
    energies = [metric.energy(full - each.dequantize().float()) for each in (swept, nearest)]
    return swept if energies[0] < (1 - _TIE) * energies[1] else nearest


def cut(start: int, stop: int, run: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of at most `limit` that are whole runs, or divide a run."""
    # Runs of 64 with a limit of 128 give pieces of two runs. A run of 192 is longer than the limit: the largest divisor
    # of 192 that is within the limit, 96, cuts it into equal pieces, so that each run ends where a piece ends.
    width = run * (limit // run) or next(width for width in range(limit, 0, -1) if run % width == 0)
    for first in range(start, stop, width):
        yield first, min(first + width, stop)
