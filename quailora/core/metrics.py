"""Metrics, which are the norms that errors are measured in: identity, diagonal, Gram."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigurationError
from .linalg import not_negative, squared_norm, symmetric_form
from .statistics import InputStatistics

SHRINKAGE = 0.2
"""Share of the correlations between input channels that the metric "shrunk" and error feedback take off."""

_EXACT_WIDTH = 256  # up to here energies are computed in float64 throughout
_LOUD = 64  # channels that stay in float64 in wider layers
_ROWS = 1024  # rows whose energy is computed at a time, which bounds the copies


class Metric(ABC):
    """A symmetric positive semidefinite `H` (in_features x in_features) that weighs a layer's input side.

    The energy of a matrix `M` is `tr(M H M^T)`: squared, total over outputs, per token when `H = mean(x x^T)`.

    Laws: `product` is linear; `energy` is never negative; `damped(d)` is `H + d * mean(diag H) * I`.
    """

    @abstractmethod
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        """Return `M H`, computed in the dtype of `M`: float32 or float64."""

    @abstractmethod
    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        """Return `tr(M H M^T)`, to about 1e-7 of it for float32 and half types, 1e-15 for float64."""

    @abstractmethod
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        """Return `M H^(1/2)` where `H` is diagonal: `M` itself for the identity, else in float64. None otherwise.

        A quantization error keeps its nearly flat spectrum under such a root; under that of a Gram it decays.
        """

    @abstractmethod
    def mean_power(self) -> float:
        """Return `mean(diag H)`."""

    def centered(self, mean: Float[Tensor, " in_features"]) -> Metric:
        """Return the metric of `x - E[x]` in place of `x`, `H - mu mu^T`: what is left where a bias takes `C mu` over.

        Args:
            mean: `mu`, the mean of the inputs.

        Raises:
            ConfigurationError: if the metric knows no such form.
        """
        del mean
        raise ConfigurationError(
            f"{type(self).__name__} has no form for inputs about their mean. Take the metric gram."
        )

    @final
    def damped(self, damping: float) -> Metric:
        """Return the metric of `H + damping * mean(diag H) * I`, which keeps no copy of `H`."""
        return Damped(self, damping * self.mean_power()) if damping else self


@final
@dataclass(frozen=True)
class Identity(Metric):
    """`H = I`: the squared Frobenius norm, which no calibration data enters."""

    @override
    def centered(self, mean: Float[Tensor, " in_features"]) -> Metric:
        del mean
        return self

    @override
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        return matrix

    @override
    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        return squared_norm(matrix)

    @override
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        return matrix

    @override
    def mean_power(self) -> float:
        return 1.0


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Metric):
    """`H = diag(E[x^2])`: input channels weighted by their power, correlations ignored (QERA-approx).

    LQER's weights are of this kind, too, with the square of `E[|x|]` in place of `E[x^2]`.

    Attributes:
        second_moment: `E[x^2]` per input channel.
    """

    second_moment: Float[Tensor, " in_features"]

    @override
    def centered(self, mean: Float[Tensor, " in_features"]) -> Diagonal:
        return Diagonal((self.second_moment - mean.to(self.second_moment).square()).clamp(min=0))

    @override
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        return matrix * self.second_moment.to(matrix.dtype)

    @override
    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        return (matrix.double().square().sum(0) @ self.second_moment.double()).item()

    @override
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        return matrix.double() * self.second_moment.double().sqrt()

    @override
    def mean_power(self) -> float:
        return self.second_moment.mean().item()


@final
@dataclass(frozen=True, eq=False)
class Gram(Metric):
    """`H = E[x x^T]`: the error of the layer's output on the calibration data (QuAILoRA, eq. 1).

    Attributes:
        second_moment: `E[x x^T]`.
    """

    second_moment: Float[Tensor, "in_features in_features"]

    @override
    def centered(self, mean: Float[Tensor, " in_features"]) -> Gram:
        mean = mean.to(self.second_moment)
        return Gram(self.second_moment - torch.outer(mean, mean))

    @cached_property
    def single(self) -> Float[Tensor, "in_features in_features"]:
        """`H` in float32: the working copy of all float32 products."""
        return self.second_moment.float()

    @override
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        if matrix.dtype == torch.float64:
            return matrix @ self.second_moment.double()
        return (self.single @ matrix.T).T  # H is symmetric, and BLAS is faster with the thin factor on the right

    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        """Return `tr(M H M^T)`; in float32 with the loudest channels in float64 where the metric is wide.

        One massive channel can hold nearly all of the energy. In float32 its rounding errors would then be as large as
        what all other channels add up to.
        """
        width = len(self.second_moment)
        if matrix.dtype == torch.float64 or width <= _EXACT_WIDTH:
            return symmetric_form(matrix.double(), self.second_moment.double())
        # Split the columns of M into the loud ones, L, and the quiet ones, N, which are zero in each other's places:
        #
        #     tr(M H M^T) = tr(N H N^T) + 2 tr(N H L^T) + tr(L H L^T)
        #
        # The first term is the only one with a full product, and it has no massive channel in it: float32 will do. The
        # other two are thin, 64 columns wide, and the last one, where the large numbers are, is in float64 throughout.
        loud = self.second_moment.diagonal().topk(_LOUD).indices
        between, among = self.single[:, loud], self.second_moment[loud][:, loud].double()
        total = 0.0
        for rows in map(Tensor.float, torch.split(matrix, _ROWS)):
            mass = rows[:, loud].double()
            quiet = rows.index_fill(1, loud, 0)
            cross = ((quiet @ between).double() * mass).sum().item()
            total += symmetric_form(quiet, self.single) + 2 * cross + symmetric_form(mass, among)
        return not_negative(total)

    @override
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        del matrix
        return None

    @override
    def mean_power(self) -> float:
        return self.second_moment.diagonal().mean().item()


@final
@dataclass(frozen=True, eq=False)
class Shrunk(Metric):
    """`(1 - share) H + share diag(H)`: correlations between channels count less than the powers of channels.

    Both are estimated from the same tokens, but correlations are many, and other text has others. Shrinking towards
    the diagonal is what Ledoit and Wolf (2004) do to covariances of few samples.

    Attributes:
        inner: the metric `H`.
        diagonal: the metric `diag(H)`.
        share: share of the correlations that is taken off, from 0 to 1.
    """

    inner: Metric
    diagonal: Diagonal
    share: float

    @override
    def centered(self, mean: Float[Tensor, " in_features"]) -> Metric:
        # The correlations of x - mu are shrunk. Those of x contain mu mu^T, which is known well, and whose diagonal
        # alone would not be a metric.
        return Shrunk(self.inner.centered(mean), self.diagonal.centered(mean), self.share)

    @override
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        return torch.lerp(self.inner.product(matrix), self.diagonal.product(matrix), self.share)

    @override
    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        return (1 - self.share) * self.inner.energy(matrix) + self.share * self.diagonal.energy(matrix)

    @override
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        del matrix
        return None

    @override
    def mean_power(self) -> float:
        return self.inner.mean_power()


@final
@dataclass(frozen=True)
class Damped(Metric):
    """`H + ridge * I`.

    Attributes:
        inner: the metric `H`.
        ridge: what is added to each entry of the diagonal.
    """

    inner: Metric
    ridge: float

    @override
    def centered(self, mean: Float[Tensor, " in_features"]) -> Metric:
        return Damped(self.inner.centered(mean), self.ridge)

    @override
    def product(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"]:
        return self.inner.product(matrix) + self.ridge * matrix

    @override
    def energy(self, matrix: Float[Tensor, "rows in_features"]) -> float:
        return self.inner.energy(matrix) + self.ridge * squared_norm(matrix)

    @override
    def rooted(self, matrix: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows in_features"] | None:
        del matrix
        return None

    @override
    def mean_power(self) -> float:
        return self.inner.mean_power() + self.ridge


def gram(statistics: InputStatistics) -> Gram:
    """Return the Gram metric of statistics: the same object for all who ask, until the statistics change."""
    return statistics.cached("gram", lambda: Gram(statistics.second_moment))


def shrunk(statistics: InputStatistics, share: float = SHRINKAGE) -> Shrunk:
    """Return the metric of statistics with a share of the correlations taken off, likewise shared."""
    diagonal = Diagonal(statistics.second_moment.diagonal())
    return statistics.cached(("shrunk", share), lambda: Shrunk(gram(statistics), diagonal, share))


def check_damping(damping: float) -> None:
    """Raise a `ConfigurationError` unless a damping is at least 0; called when a solver or quantizer is made."""
    if not 0 <= damping < math.inf:
        raise ConfigurationError(f"Expected a finite damping of at least 0, got {damping}.")


def check_shrinkage(shrinkage: float) -> None:
    """Raise a `ConfigurationError` unless a shrinkage is at least 0 and below 1; called when a quantizer is made."""
    if not 0 <= shrinkage < 1:
        raise ConfigurationError(f"Expected a shrinkage from 0 to below 1, got {shrinkage}.")
