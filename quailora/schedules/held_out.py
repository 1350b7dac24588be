"""Choose how a layer is quantized by its error on tokens that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from typing_extensions import override

from ..core.metrics import check_damping
from ..errors import ConfigurationError
from ..quantizers import Quantizer
from .base import Schedule, Solve
from .layer import QuantizedLayer
from .once import Once

DAMPINGS: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
"""Dampings of the error feedback to choose from, relative to the median power of channels that are not always zero."""


@final
@dataclass(frozen=True)
class HeldOut(Schedule):
    """Quantize with the rounding that has the least error on held-out tokens.

    The candidates are the quantizer itself; rounding to the nearest level, with the scales of the least squared error;
    and error feedback onto the same levels, once for each damping. Feedback with little damping follows the observed
    inputs most closely, and feedback with much damping approaches rounding to nearest. Each candidate is fitted to one
    part of the tokens, corrected, and compared by its error on the other part. The best one is then fitted to all
    tokens, and the wrapped schedule works with it. Compared on the tokens that they were fitted to, the candidate with
    the least damping would nearly always win.

    Attributes:
        schedule: the schedule that works with the chosen rounding.
        dampings: dampings of the error feedback to choose from.
    """

    name: ClassVar[str] = "held_out"

    schedule: Schedule
    dampings: tuple[float, ...] = DAMPINGS

    def __post_init__(self) -> None:
        for damping in self.dampings:
            check_damping(damping)

    needs_validation: ClassVar[bool] = True

    @property
    @override
    def solutions(self) -> int:
        return 2 + len(self.dampings) + self.schedule.solutions

    @override
    def alone(self) -> HeldOut:
        return replace(self, schedule=self.schedule.alone() or Once())

    @override
    def check(self, quantizer: Quantizer) -> None:
        roundings(quantizer, self.dampings)
        self.schedule.check(quantizer)

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        # On the tokens that a rounding was fitted to, the one with the least damping nearly always has the least error,
        # because it has fitted their noise as well. Only other tokens show how much of that was noise.
        validation = layer.validation
        if validation is None:
            raise ConfigurationError(
                "HeldOut needs held-out tokens, which only asymmetric inputs have. Take `inputs='asymmetric'`, "
                "or the schedule that HeldOut wraps, without HeldOut."
            )

        if layer.quantizer is None:
            raise ConfigurationError("This base is quantized already, and the schedule would quantize it again.")

        def rounded(layer: QuantizedLayer, rounding: Quantizer) -> QuantizedLayer:
            return replace(layer, quantizer=rounding).requantized(layer.weight)

        def validation_error(rounding: Quantizer) -> float:
            fitted = rounded(validation.layer, rounding)
            return validation.validation_error(fitted.quantized.dequantize() + solve(fitted.objective).dense())

        rounding = min(roundings(layer.quantizer, self.dampings), key=validation_error)
        return self.schedule.choose(rounded(layer, rounding), solve, rank)


def roundings(quantizer: Quantizer, dampings: Sequence[float] = DAMPINGS) -> tuple[Quantizer, ...]:
    """Return the ways of rounding in the format of a quantizer: its own, to nearest, and by error feedback.

    Args:
        quantizer: the quantizer.
        dampings: dampings of the error feedback.

    Raises:
        ConfigurationError: if the quantizer rounds in one way only.
    """
    nearest = quantizer.with_least_error()
    damped = [nearest.with_feedback(damping) if nearest else None for damping in dampings]
    found = [rounding for rounding in (quantizer, nearest, *damped) if rounding is not None]
    if len(found) < 2 + len(dampings):
        raise ConfigurationError(
            f"{quantizer!r} rounds in one way only, and this schedule chooses among several. Take NF4 or Uniform."
        )
    return tuple(found)
