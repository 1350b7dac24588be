"""Fit a layer of the quantized network, with its own inputs, to the outputs of the full-precision one.

With inputs `x` in full precision and `x~` in the network as quantized and compensated so far, `H = E[x x^T]`,
`G = E[x x~^T]` and `H~ = E[x~ x~^T]`, the error of a weight `V` is

    E |W x - V x~|^2 = tr(W H W^T) - 2 tr(V G^T W^T) + tr(V H~ V^T)
                     = tr((W* - V) H~ (W* - V)^T) + constant,    W* = W G H~^-1

so the symmetric problem with target `W*` and metric `H~` is the exact one (reduced-rank regression). `W*` is estimated
from few tokens; a ridge `W G H~^-1 -> W (G + l I) (H~ + l I)^-1` shrinks it towards `W`, and is chosen by the error on
held-out tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigurationError
from .initializer import Initializer, LayerInitialization, QuantizedLayer
from .linalg import safe_cholesky
from .metrics import METRICS, Gram
from .objective import Objective
from .statistics import InputStatistics

RIDGES = (math.inf, 100.0, 10.0, 1.0, 0.1, 0.01)
"""Ridges to choose from, as multiples of the median power of an input channel; infinity is the target `W` itself."""


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

    def error(
        self, weight: Float[Tensor, "out_features in_features"], other: Float[Tensor, "out_features in_features"]
    ) -> float:
        """Return `E |W x - V x~|^2`: squared, total over outputs, per token."""
        weight, other = weight.double(), other.double()
        terms = (
            ((weight @ self.full) * weight).sum()
            - 2 * ((weight @ self.cross) * other).sum()
            + ((other @ self.quantized) * other).sum()
        )
        return max(0.0, terms.item())

    def target(
        self, weight: Float[Tensor, "out_features in_features"], ridge: float
    ) -> Float[Tensor, "out_features in_features"]:
        """Return `W (G + l I) (H~ + l I)^-1`, float64.

        Args:
            weight: `W`.
            ridge: `l`, as a multiple of the median of `diag(H~)`; infinity gives `W`.
        """
        weight = weight.double()
        if math.isinf(ridge):
            return weight
        scale = self.quantized.diagonal().median().item() or self.quantized.diagonal().mean().item() or 1.0
        damped = self.quantized + ridge * scale * torch.eye(self.width, dtype=torch.float64, device=weight.device)
        shift = weight @ (self.cross - self.quantized)
        return weight + torch.cholesky_solve(shift.T, safe_cholesky(damped)).T


@torch.no_grad()
def initialize_asymmetric(
    initializer: Initializer, weight: Tensor, seen: InputStatistics, held_out: InputStatistics
) -> tuple[LayerInitialization, float]:
    """Initialize a layer; return the result and the asymmetry `1 / (1 + ridge)` that did best on held-out tokens.

    An asymmetry of 0 aims at `W` itself, as the symmetric problem does; near 1 it aims at `W*`.

    The weight itself is quantized, since the base has to stay a stock one. The errors of the result are those of
    `W* - Q - C` in the metric `H~`, without the constant that no weight can change.

    Args:
        initializer: quantizer and solver; its metric has to be "gram".
        weight: `W`.
        seen: joint statistics of the inputs of both networks, twice as wide as the layer.
        held_out: the same from other tokens.

    Raises:
        ConfigurationError: if the metric is another.
    """
    if initializer.metric != "gram":
        raise ConfigurationError(f"Asymmetric inputs need the metric 'gram', got {initializer.metric!r}.")
    merged = seen.merge(held_out)
    every, inputs = PairedMoments(merged.second_moment), quantized_inputs(merged)
    stored = initializer.quantizer.quantize(weight, inputs)
    quantized = stored.dequantize().double()

    fitted, judge = PairedMoments(seen.second_moment), PairedMoments(held_out.second_moment)
    metric = Gram(fitted.quantized.contiguous())
    errors = {}
    for ridge in RIDGES:
        objective = Objective((fitted.target(weight, ridge) - quantized).float(), metric)
        correction = initializer.solver.minimise(objective, initializer.rank)
        errors[ridge] = judge.error(weight, quantized + correction.dense())
    best = min(errors, key=errors.__getitem__)

    final_metric = METRICS["gram"](inputs)
    objective = Objective((every.target(weight, best) - quantized).float(), final_metric)
    layer = QuantizedLayer(stored, objective, final_metric.energy(weight.float()), inputs)
    return initializer.correct(layer), 1 / (1 + best)


def quantized_inputs(*parts: InputStatistics) -> InputStatistics:
    """Return the statistics `H~` of the quantized network's inputs from joint ones."""
    joint = reduce(InputStatistics.merge, parts)
    moments = PairedMoments(joint.second_moment)
    inputs = InputStatistics(moments.width, joint.second_moment.device)
    inputs.add(moments.quantized * joint.tokens, joint.tokens)
    return inputs
