"""Fit a layer of the quantized network, with its own inputs, to the outputs of the full-precision one.

With inputs `x` in full precision and `x~` in the network as quantized and compensated so far, `H = E[x x^T]`,
`G = E[x x~^T]` and `H~ = E[x~ x~^T]`, the error of a weight `V` is

    E |W x - V x~|^2 = tr(W H W^T) - 2 tr(V G^T W^T) + tr(V H~ V^T)
                     = tr((W* - V) H~ (W* - V)^T) + constant,    W* = W G H~^-1

so the symmetric problem with target `W*` and metric `H~` is the exact one (reduced-rank regression). `W*` is estimated
from few tokens. A ridge `W G H~^-1 -> W (G + l I) (H~ + l I)^-1` shrinks it towards `W` in the directions that tokens
say least about, and taking only a share of the way from `W` shrinks it in all. Both are chosen by the error on held-out
tokens, the share in closed form, before anything is solved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigurationError
from .initializer import Initializer, LayerInitialization
from .layer import QuantizedLayer, Trial
from .linalg import safe_cholesky
from .statistics import InputStatistics

RIDGES = (100.0, 10.0, 1.0, 0.1, 0.01)
"""Ridges to choose from, as multiples of the median power of an input channel."""
TRUST = 0.5
"""How much of the best share for a layer alone is used. Later layers make up for the same errors of earlier ones."""


@final
@dataclass(frozen=True, eq=False)
class PairedMoments:
    """`H`, `G` and `H~` of one layer.

    Attributes:
        joint: second moment of the inputs of both networks, side by side.
    """

    joint: Float[Tensor, "both both"]

    @property
    def width(self) -> int:
        """Width of the layer's input."""
        return len(self.joint) // 2

    @property
    def full(self) -> Float[Tensor, "in_features in_features"]:
        """`H`."""
        return self.joint[: self.width, : self.width]

    @property
    def cross(self) -> Float[Tensor, "in_features in_features"]:
        """`G`."""
        return self.joint[: self.width, self.width :]

    @property
    def quantized(self) -> Float[Tensor, "in_features in_features"]:
        """`H~`."""
        return self.joint[self.width :, self.width :]

    def change(self, weight: Float[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        """Return `W (G - H~)`, float64: minus half the gradient of the error at `W`."""
        return weight.double() @ (self.cross - self.quantized)

    def error(
        self, weight: Float[Tensor, "out_features in_features"], other: Float[Tensor, "out_features in_features"]
    ) -> float:
        """Return the error of another weight in place of `W`, less its part `tr(W H W^T)` that is the same for all."""
        given = other.double()
        return ((given @ self.quantized - 2 * (weight.double() @ self.cross)) * given).sum().item()

    def shift(
        self, change: Float[Tensor, "out_features in_features"], ridge: float
    ) -> Float[Tensor, "out_features in_features"]:
        """Return `W (G + l I) (H~ + l I)^-1 - W`, float64.

        Args:
            change: of `W`, see `change`.
            ridge: `l`, as a multiple of the median of `diag(H~)`.
        """
        power = self.quantized.diagonal()
        damped = self.quantized.clone()
        damped.diagonal().add_(ridge * (power.median().item() or power.mean().item() or 1.0))
        return torch.cholesky_solve(change.T, safe_cholesky(damped)).T


@torch.no_grad()
def initialize_asymmetric(
    initializer: Initializer,
    weight: Tensor,
    seen: InputStatistics,
    held_out: InputStatistics,
    trust: float = TRUST,
) -> tuple[LayerInitialization, float]:
    """Initialize a layer; return the result and the share of the way from `W` to `W*` that the target is at.

    A share of 0 aims at `W` itself, as the symmetric problem does.

    The weight itself is quantized, since the base has to stay a stock one. The errors of the result are those of
    `W* - Q - C` in the metric `H~`, without the constant that no weight can change.

    Args:
        initializer: quantizer and solver; its metric has to be "gram" or "shrunk".
        weight: `W`.
        seen: joint statistics of the inputs of both networks, twice as wide as the layer.
        held_out: the same from other tokens.
        trust: factor of the share that does best on held-out tokens.

    Raises:
        ConfigurationError: if the metric is another.
    """
    if initializer.metric not in {"gram", "shrunk"}:
        raise ConfigurationError(f"Asymmetric inputs need the metric 'gram' or 'shrunk', got {initializer.metric!r}.")
    merged = seen.once(("merged", held_out), lambda: seen.merge(held_out))
    every, inputs = PairedMoments(merged.second_moment), merged.once("quantized", lambda: quantized_inputs(merged))
    fitted, judge = PairedMoments(seen.second_moment), PairedMoments(held_out.second_moment)
    ridge, share = choose_shrinkage(weight, fitted, judge)
    share *= trust

    def aimed(moments: PairedMoments, inputs: InputStatistics) -> QuantizedLayer:
        target = (weight.double() + share * moments.shift(moments.change(weight), ridge)).float()
        return QuantizedLayer.of(initializer.quantizer, weight, inputs, target)

    layer = aimed(every, inputs)
    if initializer.schedule.judged:
        part = seen.once("quantized", lambda: quantized_inputs(seen))
        layer = replace(layer, trial=Trial(aimed(fitted, part), partial(judge.error, weight)))
    return initializer.correct(layer), share


def choose_shrinkage(
    weight: Float[Tensor, "out_features in_features"], fitted: PairedMoments, judge: PairedMoments
) -> tuple[float, float]:
    """Return the ridge, and the share of the way to its target, that have the least error in held-out moments.

    Args:
        weight: `W`.
        fitted: moments to take the target from.
        judge: moments of other tokens.
    """
    slope, change = judge.change(weight), fitted.change(weight)
    choices = []
    for ridge in RIDGES:
        shift = fitted.shift(change, ridge)
        gradient, curvature = (slope * shift).sum().item(), ((shift @ judge.quantized) * shift).sum().item()
        share = min(1.0, max(0.0, gradient / curvature)) if curvature > 0 else 0.0
        choices.append((share * (2 * gradient - share * curvature), ridge, share))
    _, ridge, share = max(choices)  # by what it gains
    return ridge, share


def quantized_inputs(*parts: InputStatistics) -> InputStatistics:
    """Return the statistics `H~` of the quantized network's inputs from joint ones."""
    joint = reduce(InputStatistics.merge, parts)
    moments = PairedMoments(joint.second_moment)
    inputs = InputStatistics(moments.width, joint.second_moment.device)
    magnitude = joint.mean_magnitude[moments.width :]
    inputs.add(moments.quantized * joint.tokens, joint.tokens, magnitude * joint.tokens)
    return inputs
