"""Quantize, then correct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from typing_extensions import override

from .base import Schedule, Solve
from .layer import QuantizedLayer


@final
@dataclass(frozen=True)
class Once(Schedule):
    """Quantize, then correct: the base is that of quantizing alone."""

    name: ClassVar[str] = "once"

    changes_base: ClassVar[bool] = False

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        del solve, rank
        return layer
