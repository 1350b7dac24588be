"""Hidden states of two models side by side, from block to block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..calibration.activations import Activations
from ..calibration.blocks import Call, Chain, explained
from ..calibration.capture import arithmetic
from ..calibration.examples import BlockExamples
from ..calibration.windows import CalibrationDtype
from ..models.layers import Layer
from ..models.weights import execution_device, replaced
from ..quantizers import QuantizedWeight

Weights = Mapping[str, QuantizedWeight]


@final
@dataclass(frozen=True, eq=False)
class BlockWalk:
    """Hidden states of two models, the one that is aimed at and the quantized one, from block to block.

    Attributes:
        chain: the blocks of the model.
        layers: its linear layers.
        dtype: arithmetic, see `Calibration`.
        activations: the hidden states, of both models and of two blocks at a time.
        calls: the calls of all blocks for each batch.
    """

    chain: Chain
    layers: Mapping[str, Layer]
    dtype: CalibrationDtype
    activations: Activations
    calls: dict[int, list[Call]] = field(default_factory=dict)

    @torch.no_grad()
    def begin(self, batches: Sequence[Int[Tensor, "_ sequence_length"]]) -> None:
        """Compute the inputs of the first block."""
        for number, ids in enumerate(batches):
            with arithmetic(self.chain.model, self.dtype), explained(self.chain.model):
                hidden, self.calls[number] = self.chain.record(ids)
            for network in ("full", "quantized"):
                self.activations.save(0, network, number, hidden.cpu())

    @torch.no_grad()
    def advance(self, index: int, network: str, weights: Weights) -> None:
        """Compute the inputs of the next block in one of the two models."""
        with self._computing_with(weights):
            for number in self.calls:
                self.activations.save(index + 1, network, number, self._output(index, network, number).cpu())

    def examples(self, index: int, trained: Sequence[int], held_out: Sequence[int]) -> BlockExamples:
        """Return what a block is trained on.

        Args:
            index: number of the block.
            trained: numbers of the batches to train on.
            held_out: numbers of the others.
        """
        device = execution_device(self.chain.model)
        return BlockExamples(
            index,
            self.chain.names[index],
            trained,
            held_out,
            lambda number: self._output(index, "quantized", number),
            lambda number: self.activations.load(index + 1, "full", number, device),
        )

    def _output(self, index: int, network: str, number: int) -> Tensor:
        hidden = self.activations.load(index, network, number, execution_device(self.chain.model))
        with explained(self.chain.model), arithmetic(self.chain.model, self.dtype):
            return self.chain.run(index, self.calls[number][index], hidden)

    def _computing_with(self, weights: Weights) -> Any:
        return replaced(self.layers, {name: weight.dequantize() for name, weight in weights.items()})
