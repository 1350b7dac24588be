"""What a correction of the weight itself could hold is taken off before the weight is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from quailora.schedules import Schedule, Solve
from quailora.schedules.base import better
from quailora.schedules.layer import QuantizedLayer


@final
@dataclass(frozen=True)
class TakenOff(Schedule):
    """Quantize the weight without its best correction, where that is better than quantizing all of it."""

    name: ClassVar[str] = "taken_off"

    @property
    def solutions(self) -> int:
        return 3

    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        without = layer.weight - solve(layer.objective_of(layer.weight)).dense()
        return better(layer, layer.requantized(without), solve)
