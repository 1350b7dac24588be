"""One resumable run over all layers of a model, by one process or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from . import distributed
from .asymmetric import initialize_asymmetric, quantized_inputs
from .checkpoint import Checkpoint, Outcome
from .errors import named
from .layerwise import Method, initialize_layer, layers_of, ranked, seeded
from .models.layers import Layer
from .models.stream import Block, Walk
from .progress import console, counting
from .report.record import LayerRecord

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class Run:
    """Walks through a model and keeps the outcome of every layer in a checkpoint.

    Attributes:
        walk: the model, block by block; its layers are all that matter to the run.
        targets: the layers that get a correction; the others are quantized only.
        method: how.
        checkpoint: keeps outcomes, and holds those of an earlier run.
        keep_weights: keep the quantized weights, too.
        seed: seed of untrained directions.
        seconds: what each block took, filled in on the way.
    """

    walk: Walk
    targets: Mapping[str, Layer]
    method: Method
    checkpoint: Checkpoint
    keep_weights: bool = False
    seed: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def finish(self) -> None:
        """Finish every layer that is not finished yet."""
        before = sum(map(self.checkpoint.has, self.walk.layers))
        if before:
            logger.info("Going on: %d of %d layers are finished.", before, len(self.walk.layers))
        with counting("Initializing", len(self.walk.layers), before) as advance:
            start = time.perf_counter()
            for block in self.walk:
                names = self._missing(block)
                mine = distributed.packed({name: cost(block.layers[name]) for name in names})
                for _, layer in layers_of([block]):
                    if layer.name in mine:
                        self.checkpoint.save(layer.name, self._outcome(block, layer))
                    if layer.name in names:
                        advance()
                self._share(block)
                if self.walk.inputs != "full":
                    block.replacements.update({name: self._compensated(name) for name in block.layers})
                spent, start = time.perf_counter() - start, time.perf_counter()
                self.seconds[block.index] = round(self.seconds.get(block.index, 0.0) + spent, 3)
                if not console.is_terminal:  # where nobody sees a progress bar
                    logger.info("Block %d, %d layers: %.1f s.", block.index, len(block.layers), spent)

    def _missing(self, block: Block) -> set[str]:
        """Return the layers that no process has finished."""
        finished = distributed.gather({name for name in block.layers if self.checkpoint.has(name)})
        return set(block.layers) - set().union(*finished)

    def _share(self, block: Block) -> None:
        """Give every process each other's outcomes, unless they see the same files anyway."""
        here = {name for name in block.layers if self.checkpoint.has(name)}
        lacking = set(block.layers).difference(set(block.layers).intersection(*distributed.gather(here)))
        for outcomes in distributed.gather({name: self.checkpoint.load(name) for name in sorted(lacking & here)}):
            for name, outcome in outcomes.items():
                if not self.checkpoint.has(name):
                    self.checkpoint.save(name, outcome)

    def _outcome(self, block: Block, layer: Layer) -> Outcome:
        paired = self.walk.inputs == "asymmetric" and layer.expert is None
        inputs = block.statistics[layer.name]
        keep = self.keep_weights or self.walk.inputs != "full"
        if layer.name not in self.targets:
            own = quantized_inputs(inputs, block.held_out[layer.name]) if paired else inputs
            return Outcome(dequantized=self.method.initializer.quantizer.quantize(layer.weight, own).dequantize())
        asymmetry = None
        if paired:
            initializer = ranked(layer.group, {"": self.method})[""]
            with named(layer.name), seeded(layer.name, self.seed):
                result, asymmetry = initialize_asymmetric(initializer, layer.weight, inputs, block.held_out[layer.name])
        else:
            ((_, result),) = initialize_layer(layer, inputs, {"": self.method}, self.seed)
        record = LayerRecord.of(layer.name, result, block.tokens[layer.name], asymmetry)
        return Outcome(record, result.low_rank, result.quantized.dequantize() if keep else None)

    def _compensated(self, name: str) -> Tensor:
        """Return what a finished layer computes with in the quantized network: `Q + C`, or `Q`."""
        outcome = self.checkpoint.load(name)
        if outcome.dequantized is None:
            raise RuntimeError(f"no weight of {name} was kept")
        if outcome.low_rank is None:
            return outcome.dequantized
        return outcome.dequantized + outcome.low_rank.dense().to(outcome.dequantized.dtype)


def cost(layer: Layer) -> float:
    """Return the work that a layer takes, relative to other layers: products of its error with its Gram."""
    rows, columns = layer.shape
    return float(rows * columns * columns)
