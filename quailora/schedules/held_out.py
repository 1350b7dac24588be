"""Choose how a layer is quantized by its error on tokens that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from ..core.metrics import check_damping
from ..errors import ConfigurationError
from ..quantizers import Quantizer
from ..quantizers.variants import with_feedback, with_least_error
from .base import Schedule, Solve
from .layer import QuantizedLayer

DAMPINGS: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
"""Of the error feedback, to choose from, relative to the median power of an input channel."""


@final
@dataclass(frozen=True)
class HeldOut(Schedule):
    """Round in the way that has the least error on held-out tokens.

    The ways are that of the quantizer itself; to the nearest level, with scales of the least squared error; and with
    error feedback of different damping to the same levels: little damping trusts most what it has seen of the inputs,
    and much of it ends at nearest rounding. Each is fitted to some tokens and judged by the others, with its
    correction; the winner goes into the schedule, fitted to all. On their own tokens the least damped would nearly
    always win.

    Attributes:
        schedule: what the way is used in.
        dampings: to choose from.
    """

    schedule: Schedule
    dampings: tuple[float, ...] = DAMPINGS

    def __post_init__(self) -> None:
        for damping in self.dampings:
            check_damping(damping)

    judged: ClassVar[bool] = True

    @property
    def solutions(self) -> int:  # noqa: D102
        return 2 + len(self.dampings) + self.schedule.solutions

    def check(self, quantizer: Quantizer) -> None:  # noqa: D102
        self._ways(quantizer)
        self.schedule.check(quantizer)

    def _ways(self, quantizer: Quantizer) -> tuple[Quantizer, ...]:
        nearest = with_least_error(quantizer)
        return (quantizer, nearest, *(with_feedback(nearest, damping) for damping in self.dampings))

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:  # noqa: D102
        trial = layer.trial
        if trial is None:
            raise ConfigurationError("This schedule needs held-out tokens, which asymmetric inputs have.")

        def rounded(layer: QuantizedLayer, way: Quantizer) -> QuantizedLayer:
            return replace(layer, quantizer=way).requantized(layer.weight)

        def on_held_out(way: Quantizer) -> float:
            fitted = rounded(trial.layer, way)
            return trial.judge(fitted.quantized.dequantize() + solve(fitted.objective).dense())

        way = min(self._ways(layer.quantizer), key=on_held_out)
        return self.schedule.choose(rounded(layer, way), solve, rank)
