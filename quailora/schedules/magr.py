"""Weights of smaller magnitude with nearly the same outputs: MagR (Zhang et al., 2024, arXiv 2406.00800) in CLoQ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.metrics import Metric
from ..errors import ConfigurationError
from .base import Schedule, Solve
from .layer import QuantizedLayer

Matrix = Float[Tensor, "out_features in_features"]


@final
@dataclass(frozen=True)
class MagR(Schedule):
    """Reduce the largest weights of each output before rounding, while the output hardly changes (MagR, in CLoQ).

    Attributes:
        alpha: weight of the largest magnitude in the objective.
        iterations: number of proximal gradient steps.
    """

    name: ClassVar[str] = "magr"

    alpha: float = 1e-3
    iterations: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf or self.iterations < 1:
            raise ConfigurationError(
                f"Expected an alpha of at least 0 and at least 1 iteration, got {self.alpha} and {self.iterations}."
            )

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        del solve, rank
        if layer.statistics is None:
            raise ConfigurationError("MagR needs calibration: pass the InputStatistics of the layer's inputs.")
        metric = layer.objective.metric
        return layer.requantized(reduced(layer.weight, metric, self.alpha, self.iterations))


def reduced(weight: Matrix, metric: Metric, alpha: float, iterations: int) -> Matrix:
    """Return a weight whose rows have smaller maxima.

    Minimises `1/2 (w' - w) H (w' - w)^T + alpha max|w'|` for each row by proximal gradient steps, `H` scaled to a
    largest eigenvalue of 1.

    Args:
        weight: the full-precision weight `W`.
        metric: the metric `H`.
        alpha: weight of the largest magnitude in the objective.
        iterations: number of proximal gradient steps.
    """
    # A gradient step of 1 / largest eigenvalue never overshoots, which power iteration is accurate enough for: an
    # estimate from below that is a little too small makes the steps a little too long, far from the limit of 2.
    probe = torch.ones(1, weight.shape[1], device=weight.device)
    largest = 0.0
    for _ in range(20):
        probe = metric.product(probe)
        largest = probe.norm().item()
        if largest == 0:
            return weight
        probe /= largest
    original, current = weight.float(), weight.float()
    for _ in range(iterations):
        stepped = current - metric.product(current - original) / largest
        # The proximal step of alpha * max|w|. By Moreau's decomposition v = prox_f(v) + prox_f*(v), and the conjugate
        # f* of the maximum norm is the indicator of the 1-norm ball, whose proximal step is the projection onto it.
        current = stepped - onto_l1_ball(stepped, alpha)
    return current.to(weight.dtype)


def onto_l1_ball(rows: Float[Tensor, "rows columns"], radius: float) -> Float[Tensor, "rows columns"]:
    """Return the nearest point of the 1-norm ball to each row."""
    # The projection subtracts one threshold t from all magnitudes and cuts at zero, with t such that the 1-norm of what
    # is left is the radius. If k entries are left, they are the k largest, and t = (their sum - radius) / k. The right
    # k is the last one whose entry still exceeds its own t (Duchi et al., 2008). Rows inside of the ball get t = 0.
    magnitude = rows.abs().sort(dim=1, descending=True).values
    excess = magnitude.cumsum(1) - radius
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = ((magnitude * count > excess).sum(1) - 1).clamp(min=0)
    threshold = (excess.gather(1, last[:, None]) / (last[:, None] + 1)).clamp(min=0)
    return rows.sign() * (rows.abs() - threshold).clamp(min=0)
