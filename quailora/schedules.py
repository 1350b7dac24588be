"""How quantization and correction of one layer follow each other: once, in turns, or one prepared for the other.

A schedule decides what is quantized. The correction is always solved for last, on the quantized weight that was chosen,
so it is optimal for that weight whatever came before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigurationError
from .layer import QuantizedLayer
from .magnitude import reduced
from .objective import Objective
from .solvers import LowRank
from .statistics import InputStatistics

Solve = Callable[[Objective], LowRank]
"""Solves an objective at the layer's rank, in the metric of the method; `LowRank.error` is in that metric."""

Matrix = Float[Tensor, "out_features in_features"]

_PATIENCE = 2  # rounds without a better iterate
_GAIN = 1e-3  # a smaller share of the error is no gain


class Schedule(ABC):
    """Chooses the quantized weight of a layer.

    Laws: the result quantizes with the layer's own quantizer; with an alternating schedule it is the best iterate, in
    the metric that the method minimises, and so never worse than quantizing once.

    A schedule is either this class or final. Its hyper-parameters are the fields of a frozen dataclass.
    """

    changes_base: ClassVar[bool] = True
    """Whether the quantized weight differs from what quantizing the model alone gives, so that it has to be saved."""
    judged: ClassVar[bool] = False
    """Whether it looks at held-out tokens: see `QuantizedLayer.trial`."""

    @property
    def solutions(self) -> int:
        """How often a layer is quantized and solved for, at most; for estimates of time."""
        return 1

    @abstractmethod
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        """Return the layer with the quantized weight to correct.

        Args:
            layer: the weight quantized as it is.
            solve: finds corrections, see `Solve`.
            rank: rank of the correction.
        """


@final
@dataclass(frozen=True)
class Once(Schedule):
    """Quantize, then correct: the base is that of quantizing alone."""

    changes_base: ClassVar[bool] = False

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        del solve, rank
        return layer


@final
@dataclass(frozen=True)
class Alternate(Schedule):
    """Quantize `W - C` and solve for `C` in turns; keep the best iterate.

    Attributes:
        rounds: how often the weight is quantized again, at most; it ends early when two rounds gain nothing.
        start: "quantize" `W` first (LoftQ, CALDERA); or take the best "low-rank" approximation of `W` off first
            (QPiSSA); or the weights of the `rank` "outliers" among the input channels, those with the largest inputs
            (ODLRI), which a correction of that rank can hold exactly.
    """

    rounds: int = 5
    start: Literal["quantize", "low-rank", "outliers"] = "quantize"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigurationError(f"Expected at least 1 round, got {self.rounds}.")

    @property
    def solutions(self) -> int:  # noqa: D102
        return self.rounds + 2

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        if self.start == "quantize":
            return best_iterate(layer, solve, self.rounds, without_correction)
        low_rank = self.start == "low-rank"
        taken = solve(layer.objective_of(layer.weight)).dense() if low_rank else outliers(layer, rank)
        started = layer.requantized(layer.weight - taken)
        return better(layer, best_iterate(started, solve, self.rounds - 1, without_correction), solve)


@final
@dataclass(frozen=True)
class Preserve(Schedule):
    """Take the leading `k` directions of the weight off before quantizing (SRR, Preserve-then-quantize).

    `k` has the least `rho_k(W) rho_(r-k)(N)`, where `rho_p(M)` is the share of the energy of `M` outside of its `p`
    leading directions in the metric, and `N` is uniform noise in place of the rounding error that is not known yet.
    """

    @property
    def solutions(self) -> int:  # noqa: D102
        return 5  # subspaces of the weight and of the noise, both bases, and the better one

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        weight = layer.objective_of(layer.weight)
        generator = torch.Generator(layer.weight.device).manual_seed(0)
        noise = torch.empty_like(layer.weight, dtype=torch.float32).uniform_(-1, 1, generator=generator)
        kept = preserved_rank(weight, layer.objective_of(noise), rank)
        if not kept:
            return layer
        basis, coefficients = weight.projection(weight.subspace(rank).leading(kept))
        return better(layer, layer.requantized(layer.weight - basis @ coefficients), solve)


@final
@dataclass(frozen=True)
class Project(Schedule):
    """Round with error feedback that does not see what the correction will repair (ProjQ).

    With `U` the output directions of the correction so far, an error `E` leaves `E H E^T` outside of `U`. Its part
    along the inputs `H E^T U` is the correction's, so the feedback works on `H` without these.

    Attributes:
        rounds: how often the weight is quantized again, at most.
    """

    rounds: int = 5

    @property
    def solutions(self) -> int:  # noqa: D102
        return self.rounds + 2

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        del rank
        if layer.statistics is None or not layer.quantizer.calibrated:
            raise ConfigurationError("This schedule needs a quantizer with error feedback, and calibration.")

        def projected(layer: QuantizedLayer, found: LowRank) -> QuantizedLayer:
            assert layer.statistics is not None
            return layer.requantized(layer.weight, deflated(layer.statistics, layer.objective, found.rank))

        return best_iterate(layer, solve, self.rounds, projected)


@final
@dataclass(frozen=True)
class ReduceMagnitude(Schedule):
    """Shrink each output's largest weight, as far as its output barely changes, before rounding (MagR, in CLoQ).

    Attributes:
        alpha: weight of the largest magnitude.
        iterations: steps.
    """

    alpha: float = 1e-3
    iterations: int = 30

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        del solve, rank
        if layer.statistics is None:
            raise ConfigurationError("This schedule needs calibration.")
        metric = layer.objective.metric
        return layer.requantized(reduced(layer.weight, metric, self.alpha, self.iterations))


def best_iterate(
    layer: QuantizedLayer,
    solve: Solve,
    rounds: int,
    following: Callable[[QuantizedLayer, LowRank], QuantizedLayer],
) -> QuantizedLayer:
    """Return the best of a layer and of those that follow, one after the other, in the metric that is solved in.

    Args:
        layer: the first.
        solve: see `Solve`.
        rounds: how many follow, at most; it ends early when two rounds gain nothing.
        following: makes the next one from a layer and its correction.
    """
    found = solve(layer.objective)
    best, least, stale = layer, found.error, 0
    for _ in range(rounds):
        layer = following(layer, found)
        found = solve(layer.objective)
        stale = 0 if found.error < (1 - _GAIN) * least else stale + 1
        if found.error < least:
            best, least = layer, found.error
        if stale == _PATIENCE:
            break
    return best


def better(first: QuantizedLayer, second: QuantizedLayer, solve: Solve) -> QuantizedLayer:
    """Return the layer whose correction leaves less, the first one if they are equal."""
    return min((first, second), key=lambda layer: solve(layer.objective).error)


def without_correction(layer: QuantizedLayer, found: LowRank) -> QuantizedLayer:
    """Quantize what the correction leaves to do, `W - C`."""
    return layer.requantized(layer.weight - found.dense())


def outliers(layer: QuantizedLayer, count: int) -> Matrix:
    """Return the weight's columns with the largest inputs; the others are zero."""
    if layer.statistics is None:
        raise ConfigurationError("A start from outliers needs calibration.")
    loud = layer.statistics.second_moment.diagonal().topk(count).indices
    taken = torch.zeros_like(layer.weight)
    taken[:, loud] = layer.weight[:, loud]
    return taken


def preserved_rank(weight: Objective, noise: Objective, rank: int) -> int:
    """Return how many directions of the weight to take off; see `Preserve`."""
    tails = []
    for objective in (weight, noise):
        total, energies = objective.value_at_zero, objective.subspace(rank).energies
        tails.append(1 - torch.cat([energies.new_zeros(1), energies.cumsum(0)]) / total if total > 0 else None)
    if tails[0] is None or tails[1] is None:
        return 0
    return int((tails[0] * tails[1].flip(0)).argmin())


def deflated(statistics: InputStatistics, objective: Objective, rank: int) -> InputStatistics:
    """Return statistics without the input directions in which the best correction removes all error.

    `H' = H - K S^-1 K^T` with `K = H E^T U` and `S = U^T E H E^T U`, which is diagonal for the leading eigenvectors
    `U`; with any root `H = L L^T` this is `L (I - V V^T) L^T`, `V` being the right singular vectors of `E L`.
    """
    # Added twice: for the rounding of H, and for what is left if rounding is all that is.
    moment = statistics.second_moment
    ridge = torch.finfo(torch.float32).eps * moment.trace() * torch.eye(len(moment), device=moment.device)
    moment = moment + ridge
    rows = objective.subspace(rank).basis.double().T @ objective.error.double()
    along = rows @ moment  # K^T
    values, vectors = torch.linalg.eigh(along @ rows.T)
    live = values > torch.finfo(torch.float32).eps * values.max()
    whitened = (vectors[:, live] / values[live].sqrt()).T @ along
    rest = moment - whitened.T @ whitened + ridge
    result = InputStatistics(statistics.in_features, rest.device)
    result.add((rest + rest.T) / 2 * statistics.tokens, statistics.tokens)
    return result
