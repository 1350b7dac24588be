"""Fit a layer of the quantized network, with its own inputs, to the outputs of the full-precision one.

This is reduced-rank regression: the layer gets the target `W* = W G H~^-1` in place of its weight `W`, and the metric
`H~`, with `G = E[x x~^T]` and `H~ = E[x~ x~^T]` for inputs `x` in full precision and `x~` in the network as quantized
and corrected so far. `W*` is estimated from few tokens, so the target lies between `W` and a ridge estimate of `W*`.
The ridge, and how far the target lies from `W`, are chosen by the error on held-out tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import repaired_cholesky, safe_cholesky
from ..core.metrics import gram
from ..core.paired import PairedStatistics
from ..core.statistics import InputStatistics
from ..errors import CalibrationError, ConfigurationError
from ..quantizers import QuantizedWeight, Quantizer
from ..schedules.layer import QuantizedLayer, Validation
from .initializer import Initializer, LayerInitialization

RIDGES = (100.0, 10.0, 1.0, 0.1, 0.01)
"""Ridges to choose from, as multiples of `typical(diag(H~))`."""
STEP = 0.5
"""How much of the step that is best for a layer alone is taken. Later layers make up for the same errors as it does."""

# With H = E[x x^T], and G and H~ as above, the error of a weight V is
#
#     E |W x - V x~|^2 = tr(W H W^T) - 2 tr(V G^T W^T) + tr(V H~ V^T)
#                      = tr((W* - V) H~ (W* - V)^T) + constant,    W* = W G H~^-1
#
# so that the symmetric problem with W* in place of W and H~ in place of H has the same solution. A ridge,
#
#     W (G + l I) (H~ + l I)^-1 = W + W (G - H~) (H~ + l I)^-1,
#
# moves the target towards W in the directions that tokens say least about, and taking only a share of the step from W
# shortens it in all directions. Both are chosen by the error on held-out tokens before anything is solved.
#
# An input of width n needs 5 n^2 numbers in float64. Four are the moments of all tokens and of the held-out ones. The
# fit to the others is made in float32, from differences. The target is computed in float64, once, and the Cholesky
# factor of H~ + l I takes the fifth.

_ROWS = 512  # rows of a moment that are converted at a time

Weight = Float[Tensor, "out_features in_features"]


@torch.no_grad()
def initialize_asymmetric(
    initializer: Initializer,
    weight: Tensor,
    statistics: PairedStatistics,
    held_out: PairedStatistics,
    step: float = STEP,
    quantized: QuantizedWeight | None = None,
) -> tuple[LayerInitialization, float]:
    """Initialize a layer; return the result, and which share of the step from `W` to its ridge target was taken.

    The target of the layer is `T = W + share * (W*_l - W)`, with the ridge target `W*_l = W (G + l I) (H~ + l I)^-1`.
    The share that is returned contains the factor `step`. With a share of 0 the target is `W` itself, as in the
    symmetric problem.

    `W` itself is quantized, not the target, so that the base is a quantized form of the full-precision model; schedules
    that choose a base quantize it again, from the target.
    The errors of the result are `tr((T - Q - C) H~ (T - Q - C)^T)`. They would be the error of the output up to a
    constant only if `T` were `W*`.

    Args:
        initializer: quantizer and solver; its weighting has to keep correlations.
        weight: the full-precision weight `W`.
        statistics: statistics of the inputs of both networks, over all tokens.
        held_out: statistics of those of these tokens that are held out.
        step: factor of the share that has the least error on held-out tokens, from 0 to 1.
        quantized: `Q`, if it is there already.

    Raises:
        ConfigurationError: if the weighting does not keep correlations, or there is neither a quantizer nor `Q`.
        CalibrationError: if no token, or every one, is held out.
    """
    layer, share = asymmetric_layer(initializer, weight, statistics, held_out, step, quantized)
    return initializer.correct(layer), share


def asymmetric_layer(
    initializer: Initializer,
    weight: Tensor,
    statistics: PairedStatistics,
    held_out: PairedStatistics,
    step: float = STEP,
    quantized: QuantizedWeight | None = None,
) -> tuple[QuantizedLayer, float]:
    """Return the layer that is to be corrected, with its target, and the share; see `initialize_asymmetric`."""
    if not initializer.weighting.keeps_correlations:
        raise ConfigurationError(
            f"Asymmetric inputs need a weighting that keeps correlations of the inputs, got {initializer.weighting!r}. "
            "Take the metric gram or shrunk, or full inputs."
        )
    base = initializer.base(quantized)
    statistics, held_out = statistics.to(weight.device), held_out.to(weight.device)
    fit, ridge, share = chosen_step(weight, statistics, held_out, step)
    target = (weight.double() + share * shift(weight, statistics, ridge)).float()
    layer = QuantizedLayer.of(base, weight, statistics.quantized, target)
    if initializer.schedule.needs_validation:
        layer = replace(layer, validation=validation_of(base, statistics, held_out, fit, ridge, share))
    return layer, share


def chosen_step(
    weight: Weight, statistics: PairedStatistics, held_out: PairedStatistics, step: float
) -> tuple[HeldOutFit, float, float]:
    """Return the fit to the tokens that are not held out, and the ridge and the share that its target is made with.

    Raises:
        CalibrationError: if no token, or every one, is held out.
    """
    if not 0 < held_out.tokens < statistics.tokens:
        raise CalibrationError(
            f"Expected some of {statistics.tokens} tokens to be held out, got {held_out.tokens}. "
            "Calibrate on more samples."
        )
    fit = HeldOutFit.of(weight, statistics, held_out)
    ridge, share = fit.choose()
    return fit, ridge, share * step


def validation_of(
    base: Quantizer | QuantizedWeight,
    statistics: PairedStatistics,
    held_out: PairedStatistics,
    fit: HeldOutFit,
    ridge: float,
    share: float,
) -> Validation:
    """Return a layer that is fitted to the tokens that are not held out, with the error on those that are.

    Args:
        base: makes `Q` from the weight, or is `Q`.
        statistics: statistics of all tokens.
        held_out: statistics of those that are held out.
        fit: the fit, with the ridge and the share of its target; see `chosen_step`.
        ridge: see `HeldOutFit.shift`.
        share: share of the step from the weight to the target.
    """
    seen = statistics.quantized.cached(("seen", held_out), lambda: statistics.quantized.without(held_out.quantized))
    target = fit.weight.float() + share * fit.shift(ridge)
    return Validation(QuantizedLayer.of(base, fit.weight, seen, target), fit.error)


def shift(weight: Weight, statistics: PairedStatistics, ridge: float) -> Weight:
    """Return `W (G + l I) (H~ + l I)^-1 - W`, solved in float64.

    Args:
        weight: the full-precision weight `W`.
        statistics: `G` and `H~`.
        ridge: `l` divided by `typical(diag(H~))`.
    """
    # W (G + l I) (H~ + l I)^-1 - W = W (G - H~) (H~ + l I)^-1. The right side needs no difference of large numbers: the
    # statistics hold G - H~ as it was summed up. With H~ + l I = L L^T it takes two triangular solves for the
    # transpose.
    moment = statistics.quantized.second_moment
    power = moment.diagonal().clone()
    moment.diagonal().add_(ridge * typical(power))  # in place, since a copy would take the memory of the factor
    try:
        factor = safe_cholesky(moment)
    finally:
        moment.diagonal().copy_(power)
    half = torch.linalg.solve_triangular(factor, (weight.double() @ statistics.gap).T, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True).T
    return found


def typical(power: Float[Tensor, " in_features"]) -> float:
    """Return the median power of all input channels; the mean if that is zero; 1 if every channel is always zero."""
    return power.median().item() or power.mean().item() or 1.0


@final
@dataclass(frozen=True, eq=False)
class HeldOutFit:
    """A fit of one layer, in float32, to the tokens that are not held out; its error is measured on the held-out ones.

    Attributes:
        weight: the full-precision weight `W`.
        moment: `H~` of the tokens that are fitted to, divided by `power`, the typical power of a channel.
        change: `W (G - H~)` of the same tokens, divided by `power`: minus half the gradient of their error at `W`.
        slope: `W (G - H~)` of the tokens that are held out.
        held_out: statistics of the tokens that are held out.
    """

    weight: Weight
    moment: Float[Tensor, "in_features in_features"]
    change: Weight
    slope: Weight
    held_out: InputStatistics

    @classmethod
    def of(cls, weight: Weight, statistics: PairedStatistics, held_out: PairedStatistics) -> HeldOutFit:
        """Prepare a fit; layers with the same input share `moment`.

        Args:
            weight: the full-precision weight `W`.
            statistics: statistics of all tokens.
            held_out: statistics of the held-out tokens among them.
        """
        # A mean over all tokens is `share` times that over the held-out ones plus (1 - share) times that over the
        # others. `moment` and `change` are linear in the moments, so those of the other tokens follow by subtraction,
        # without a third sum while the model runs. `slope` is that of the held-out tokens. Dividing by `power` makes
        # the typical entry of the diagonal one, where float32 is safe.
        share = held_out.tokens / statistics.tokens
        every, held = statistics.quantized.second_moment, held_out.quantized.second_moment
        power = typical((every.diagonal() - share * held.diagonal()) / (1 - share))

        def fitted(total: Tensor, part: Tensor) -> Tensor:
            scaled = torch.empty_like(total, dtype=torch.float32)
            for out, rows, others in zip(
                *(torch.split(matrix, _ROWS) for matrix in (scaled, total, part)), strict=True
            ):
                out.copy_((rows - share * others) / ((1 - share) * power))
            return scaled

        moment = statistics.quantized.cached(("fitted", held_out), lambda: fitted(every, held))
        full = weight.double()
        slope = full @ held_out.gap
        change = fitted(full @ statistics.gap, slope)
        return cls(weight, moment, change, slope.float(), held_out.quantized)

    def shift(self, ridge: float) -> Weight:
        """Return `W (G + l I) (H~ + l I)^-1 - W` of the tokens that are fitted to.

        The matrix is scaled to ones on its diagonal first. Its factor then has the precision of float32 for each
        channel by itself, however much louder another one is.

        Args:
            ridge: `l` divided by `typical(diag(H~))`, so that it is added to `moment` as it is.
        """
        # With M = H~ + l I and S = diag(M)^(-1/2), M^-1 = S (S M S)^-1 S. The matrix S M S that is factored has ones on
        # its diagonal.
        damped = self.moment.clone()
        damped.diagonal().add_(ridge)
        scale = damped.diagonal().rsqrt()
        factor, _ = repaired_cholesky(damped.mul_(scale).mul_(scale[:, None]))
        return torch.cholesky_solve((self.change * scale).T, factor).T * scale

    def choose(self) -> tuple[float, float]:
        """Return the ridge, and the share of the step to its target, with the least error on held-out tokens."""
        # On held-out tokens the error of W + t D, less that of W, is the parabola t^2 c - 2 t g, with the descent
        # g = <W (G - H~), D>, minus half its slope at t = 0, and the bend c = tr(D H~ D^T), half its second derivative,
        # both of the held-out moments. Its minimum is at t = g / c, which is cut to [0, 1]; there it gains
        # t (2 g - t c). If g is negative, every step in this direction increases the error.
        choices = []
        metric = gram(self.held_out)
        for ridge in RIDGES:
            shift = self.shift(ridge)
            descent, bend = (self.slope * shift).sum(dtype=torch.float64).item(), metric.energy(shift)
            share = min(1.0, max(0.0, descent / bend)) if bend > 0 else 0.0
            choices.append((share * (2 * descent - share * bend), ridge, share))
        _, ridge, share = max(choices)
        return ridge, share

    def error(self, other: Weight) -> float:
        """Return the error on held-out tokens of another weight in place of `W`, less that of `W` itself."""
        # With V = W + D: E|W x - V x~|^2 = E|W (x - x~)|^2 - 2 <W (G - H~), D> + tr(D H~ D^T). The first term is that
        # of W.
        change = other.float() - self.weight.float()
        return gram(self.held_out).energy(change) - 2 * (self.slope * change).sum(dtype=torch.float64).item()
