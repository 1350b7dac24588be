"""In which norm an error counts: identity, diagonal, Gram; and the objective that solvers minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from .errors import ConfigurationError
from .statistics import InputStatistics


class Metric(ABC):
    """A symmetric positive semidefinite `H` (in_features x in_features) that weighs a layer's input side.

    The energy of a matrix `M` is `tr(M H M^T)`: squared, total over outputs, per token when `H = mean(x x^T)`.

    Laws: `product` is linear; `energy` is never negative; `damped(d)` is `H + d * mean(diag H) * I`.
    """

    @abstractmethod
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        """Return `M H` in float64."""

    @abstractmethod
    def damped(self, damping: float) -> Metric:
        """Return the metric of `H + damping * mean(diag H) * I`."""

    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        """Return `tr(M H M^T)`, computed in float64."""
        return max(0.0, (self.product(matrix) * matrix.double()).sum().item())


@final
@dataclass(frozen=True, eq=False)
class Identity(Metric):
    """`H = I`: the squared Frobenius norm, which no calibration data enters."""

    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:  # noqa: D102
        return matrix.double()

    def damped(self, damping: float) -> Identity:  # noqa: D102
        del damping  # a multiple of the identity has the same minimisers
        return self


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Metric):
    """`H = diag(E[x^2])`: input channels weighted by their power, correlations ignored (QERA-approx).

    Attributes:
        second_moment: `E[x^2]` per input channel.
    """

    second_moment: Float[Tensor, " in_features"]

    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:  # noqa: D102
        return matrix.double() * self.second_moment.double()

    def damped(self, damping: float) -> Diagonal:  # noqa: D102
        return Diagonal(self.second_moment + damping * self.second_moment.mean())


@final
@dataclass(frozen=True, eq=False)
class Gram(Metric):
    """`H = E[x x^T]`: the error of the layer's output on the calibration data (QuAILoRA, eq. 1).

    Attributes:
        second_moment: `E[x x^T]`.
    """

    second_moment: Float[Tensor, "in_features in_features"]

    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:  # noqa: D102
        return matrix.double() @ self.second_moment.double()

    def damped(self, damping: float) -> Gram:  # noqa: D102
        if damping == 0:
            return self
        damped = self.second_moment.clone()
        damped.diagonal().add_(damping * self.second_moment.diagonal().mean())
        return Gram(damped)


MetricName = Literal["identity", "diagonal", "gram"]

METRICS: dict[MetricName, Callable[[InputStatistics], Metric]] = {
    "identity": lambda _: Identity(),
    "diagonal": lambda statistics: Diagonal(statistics.second_moment.diagonal()),
    "gram": lambda statistics: Gram(statistics.second_moment),
}


@final
@dataclass(frozen=True, eq=False)
class Objective:
    """The problem that every solver gets: `min tr((E - C) H (E - C)^T)` over `C = lora_B @ lora_A` of a given rank.

    `E H` and the value at `C = 0` are computed once, however many solvers ask.

    Attributes:
        error: `E = W - Q`, any float dtype; the arithmetic here is float64.
        metric: `H`.
    """

    error: Float[Tensor, "out_features in_features"]
    metric: Metric

    @cached_property
    def error64(self) -> Float[Tensor, "out_features in_features"]:
        """`E` in float64."""
        return self.error.double()

    @cached_property
    def product(self) -> Float[Tensor, "out_features in_features"]:
        """`E H` in float64."""
        return self.metric.product(self.error)

    @cached_property
    def value_at_zero(self) -> float:
        """`tr(E H E^T)`: the error without any correction."""
        return max(0.0, (self.product * self.error64).sum().item())

    def value(self, lora_B: Float[Tensor, "out_features rank"], lora_A: Float[Tensor, "rank in_features"]) -> float:
        """Return `tr((E - C) H (E - C)^T)` at `C = lora_B @ lora_A`: squared, total over outputs, per token.

        Expanded as `tr(E H E^T) - 2 tr(C H E^T) + tr(C H C^T)`, so that no dense `E - C` is formed. In float64 the
        cancellation costs about 1e-16 of the error without correction.
        """
        lora_B, lora_A = lora_B.double(), lora_A.double()
        cross = ((lora_B.T @ self.product) * lora_A).sum()
        square = (self.metric.product(lora_A) * (lora_B.T @ lora_B @ lora_A)).sum()
        return max(0.0, self.value_at_zero - 2 * cross.item() + square.item())


def check_damping(damping: float) -> None:
    """Raise a `ConfigurationError` for a negative damping; called when a solver or quantizer is made."""
    if damping < 0:
        raise ConfigurationError(f"Expected a damping of at least 0, got {damping}.")
