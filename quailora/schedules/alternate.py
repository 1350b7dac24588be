"""Quantization and correction in turns: LoftQ, QPiSSA, CALDERA, ODLRI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigurationError, check_choice
from ..families import Fit
from .base import Schedule, Solve, best_iterate, better, check_rounds
from .layer import QuantizedLayer


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

    name: ClassVar[str] = "alternate"

    rounds: int = 5
    start: Literal["quantize", "low-rank", "outliers"] = "quantize"

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        check_choice("a start", self.start, ("quantize", "low-rank", "outliers"))

    @property
    @override
    def solutions(self) -> int:
        return self.rounds + 2

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        if self.start == "quantize":
            return best_iterate(layer, solve, self.rounds, without_correction)
        low_rank = self.start == "low-rank"
        # Whatever was taken off before quantizing comes back as part of the correction, which is solved for at the end.
        # The result is compared with quantizing the weight as it is, so that the start can only help.
        taken = solve(layer.objective_of(layer.weight)).dense() if low_rank else outliers(layer, rank)
        started = layer.requantized(layer.weight - taken)
        return better(layer, best_iterate(started, solve, self.rounds - 1, without_correction), solve)


def without_correction(layer: QuantizedLayer, correction: Fit) -> QuantizedLayer:
    """Return the layer with `Q` made from `W - C`, the part of the weight that the correction does not hold."""
    return layer.requantized(layer.weight - correction.dense())


def outliers(layer: QuantizedLayer, count: int) -> Float[Tensor, "out_features in_features"]:
    """Return the weight's columns with the largest inputs; the others are zero."""
    if layer.statistics is None:
        raise ConfigurationError(
            "A start from outliers needs calibration: pass the InputStatistics of the layer's inputs."
        )
    loud = layer.statistics.second_moment.diagonal().topk(count).indices
    taken = torch.zeros_like(layer.weight)
    taken[:, loud] = layer.weight[:, loud]
    return taken
