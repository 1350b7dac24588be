"""The interface of all schedules, and what those that go through several weights share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from ..core.objective import Objective
from ..errors import ConfigurationError
from ..families import Fit
from ..quantizers import Quantizer
from .layer import QuantizedLayer

Solve = Callable[[Objective], Fit]
"""Solves an objective at the layer's rank, in the metric of the method; `Fit.error` is in that metric."""

_PATIENCE = 2  # rounds without a better iterate
_GAIN = 1e-3  # a smaller share of the error is no gain


class Schedule(ABC):
    """Chooses the quantized weight of a layer.

    Laws: the result is in the format of the layer's own quantizer; with an alternating schedule it is the best iterate,
    in the metric that the method minimises, and so never worse than quantizing once.

    A schedule is either this class or final. Its hyper-parameters are the fields of a frozen dataclass.
    """

    name: ClassVar[str] = ""
    """Short name on the command line and in files; a class without one is named by its import path."""
    changes_base: ClassVar[bool] = True
    """Whether the quantized weight differs from what quantizing the model alone gives, so that it has to be saved."""
    needs_validation: ClassVar[bool] = False
    """Whether the schedule compares errors on held-out tokens; see `QuantizedLayer.validation`."""

    @property
    def solutions(self) -> int:
        """How often a layer is quantized and solved for, at most; for estimates of time."""
        return 1

    def check(self, quantizer: Quantizer) -> None:
        """Raise a `ConfigurationError` if the schedule cannot work with a quantizer; by default all of them work."""
        del quantizer

    def alone(self) -> Schedule | None:
        """Return the schedule for layers that get no correction; None to quantize them once, as most schedules do."""
        return None

    @abstractmethod
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        """Return the layer with the quantized weight to correct.

        Args:
            layer: the weight quantized as it is.
            solve: finds corrections, see `Solve`.
            rank: rank of the correction.
        """


def check_rounds(rounds: int) -> None:
    """Raise a `ConfigurationError` unless there is at least one round; called when a schedule is made."""
    if rounds < 1:
        raise ConfigurationError(f"Expected at least 1 round, got {rounds}.")


def best_iterate(
    layer: QuantizedLayer,
    solve: Solve,
    rounds: int,
    following: Callable[[QuantizedLayer, Fit], QuantizedLayer],
) -> QuantizedLayer:
    """Return the layer with the least error among a first one and those that are made from it one after the other.

    Errors are in the metric of the method.

    Args:
        layer: the first layer of the sequence.
        solve: finds corrections; see `Solve`.
        rounds: how many follow, at most; it ends early when two rounds gain nothing.
        following: makes the next one from a layer and its correction.
    """
    # Rounding makes the error of these iterations go up as well as down, so the best one is kept, and an iterate
    # without gain does not end the search at once.
    correction = solve(layer.objective)
    best, least, stale = layer, correction.error, 0
    for _ in range(rounds):
        layer = following(layer, correction)
        correction = solve(layer.objective)
        stale = 0 if correction.error < (1 - _GAIN) * least else stale + 1
        if correction.error < least:
            best, least = layer, correction.error
        if stale == _PATIENCE:
            break
    return best


def better(first: QuantizedLayer, second: QuantizedLayer, solve: Solve) -> QuantizedLayer:
    """Return the layer whose correction leaves less, the first one if they are equal."""
    return min((first, second), key=lambda layer: solve(layer.objective).error)
