"""What a visit of a walk gets, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final

from torch import Tensor, nn

from ..core.statistics import InputStatistics
from ..errors import NumericalError
from ..models.layers import Layer
from .collector import LayerInputs


@final
class Block:
    """What a visit gets: layers of one block, whose weights are in memory during the visit.

    For full inputs these are all its layers, else a group of them with one input, so that an index comes several times.

    Args:
        index: number of the block in the model, from 0. Layers outside all blocks come last, with the next number.
        inputs: statistics of the inputs of each layer, by the layer's name.
    """

    def __init__(self, index: int, inputs: Mapping[str, LayerInputs]) -> None:
        self.index = index
        self.layers: Mapping[str, Layer] = {name: one.layer for name, one in inputs.items()}
        self._inputs = dict(inputs)

    def drain(self) -> Iterator[LayerInputs]:
        """Yield what is known of the inputs of each layer, in the order of the model, once.

        Statistics are freed when the last layer that shares them has been yielded and is not used any more.
        """
        previous: InputStatistics | None = None
        while self._inputs:
            current = self._inputs.pop(next(iter(self._inputs)))
            if previous is not None and previous is not current.statistics:
                previous.clear_cache()
            previous = current.statistics
            yield current
            del current
        if previous is not None:
            previous.clear_cache()


Visit = Callable[[Block], Mapping[str, Tensor]]
"""Works on a block. Returns {} for inputs "full", else the new weight, (out_features, in_features), of every layer of
the block by name, which the quantized network computes with from then on."""


def check_finite_parameters(name: str, block: nn.Module) -> None:
    """Raise a `NumericalError` that names the first weight with NaN or infinite entries."""
    for parameter, value in block.named_parameters():
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericalError(
                f"Expected finite weights, got NaN or infinite entries in {name}.{parameter}. "
                "The checkpoint is damaged, or its dtype overflowed."
            )
