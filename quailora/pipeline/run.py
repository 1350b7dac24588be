"""One resumable run over all layers of a model, by one process or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor

from ..calibration.walk import Block, Walk
from ..calibration.windows import Calibration
from ..errors import ConfigurationError, named
from ..layer.asymmetric import initialize_asymmetric
from ..layer.initializer import LayerInitialization
from ..layer.record import LayerRecord
from ..methods.distillation import Polish
from ..methods.method import Method
from ..models.layers import Layer
from ..models.limits import check_token_ids
from ..models.weights import resident
from ..quantizers import QuantizedWeight
from ..solvers import Correction
from ..solvers.fisher import Sensitivity
from ..support import distributed
from ..support.progress import Counter, console, counting
from .checkpoint import Checkpoint, Outcome
from .fingerprint import digest
from .layerwise import initialize_layer, initializers, layers_of, seeded

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class Run:
    """Walks through a model once and keeps the outcome of every layer, by each method, in a checkpoint.

    Methods share what they can: statistics, quantized weights, and what solvers find. On other inputs than `full` there
    can be one only, since it decides what the layers after see.

    Attributes:
        walk: the model, block by block; its layers are all that matter to the run.
        targets: the layers that get a correction; the others are quantized only.
        methods: how, by name; a name is a folder of the checkpoint, or empty.
        checkpoint: keeps outcomes, and holds those of an earlier run.
        keep_weights: methods whose quantized weights are kept, too.
        keep_packed: whether they are also kept as a checkpoint has them.
        seed: seed of untrained directions.
        sensitivities: of the targets, for methods in the metric "fisher".
        silent: layers of the base that no text reaches; they are quantized without statistics.
        seconds: what each block took, filled in on the way.
    """

    walk: Walk
    targets: Mapping[str, Layer]
    methods: Mapping[str, Method]
    checkpoint: Checkpoint
    keep_weights: Collection[str] = ()
    keep_packed: bool = False
    seed: int = 0
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    silent: Mapping[str, Layer] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Layer]:
        """All layers that the run quantizes, those that no text reaches among them."""
        return {**self.walk.layers, **self.silent}

    def finish(self) -> None:
        """Finish every layer that is not finished yet.

        Where layers are missing that an earlier walk has been through, since their files were damaged, a walk from the
        start follows, and makes these again.
        """
        if self.walk.inputs != "full" and len(self.methods) != 1:
            raise ConfigurationError(f"Expected one method on {self.walk.inputs} inputs, got {len(self.methods)}.")
        before = sum(not self._missing_here(layer) for layer in self.walk.layers)
        if before:
            logger.info("Going on: %d of %d layers are finished.", before, len(self.walk.layers))
        with counting("Initializing", len(self.walk.layers), before) as counter:
            self._go_through(replace(self.walk, on_batch=counter.describe), counter)
            if any(distributed.gather(any(map(self._missing_here, self.walk.layers)))):
                self._go_through(replace(self.walk, start=0, on_batch=counter.describe), counter)
        self._quantize_silent()

    def _go_through(self, walk: Walk, counter: Counter) -> None:
        """Go through the model once, and make the layers that are missing."""
        start = time.perf_counter()
        for block in walk:
            counter.describe(f"Block {block.index}: layers")
            names = self._missing(block)
            mine = distributed.packed({name: cost(block.layers[name]) for name in names})
            for _, layer in layers_of([block]):
                if layer.name in mine:
                    for method, outcome in self._outcomes(block, layer):
                        self.checkpoint.save(key(method, layer.name), outcome)
                if layer.name in names:
                    counter.advance()
            self._share(block)
            if self.walk.inputs != "full":
                (method,) = self.methods
                block.replacements.update({name: self.compensated(method, name) for name in block.layers})
            spent, start = time.perf_counter() - start, time.perf_counter()
            self.seconds[block.index] = round(self.seconds.get(block.index, 0.0) + spent, 3)
            if not console.is_terminal:  # where nobody sees a progress bar
                logger.info("Block %d, %d layers: %.1f s.", block.index, len(block.layers), spent)

    def _quantize_silent(self) -> None:
        """Quantize the layers that no text reaches; with a quantizer that needs inputs they stay as they are.

        The first of several processes does it, which is the one that writes the base.
        """
        for method, settings in self.methods.items() if self.silent and distributed.rank() == 0 else ():
            quantizer = settings.initializer.quantizer
            if quantizer.needs_calibration:
                logger.warning(
                    "The base keeps %d layers that text never reaches in full precision: %r needs their inputs.",
                    len(self.silent),
                    quantizer,
                )
                continue
            for name in self.silent:
                layer = self.silent[name]
                if not self.checkpoint.has(key(method, name)):
                    with resident(layer.module):
                        stored = quantizer.for_layer(name).quantize(layer.weight)
                    self.checkpoint.save(key(method, name), Outcome(None, None, *self._kept(stored)))

    def outcomes(self, method: str, polish: Polish | None = None) -> dict[str, Outcome]:
        """Return what a finished run made of each layer by one of its methods; tensors are memory-mapped.

        Args:
            method: its name.
            polish: a training that followed, see `polish`.
        """
        silent = [name for name in self.silent if self.checkpoint.has(key(method, name))]
        found = {name: self.checkpoint.load(key(method, name)) for name in (*self.walk.layers, *silent)}
        if polish is not None:
            keys = polished_keys(method, polish, self.targets)
            found |= {name: self.checkpoint.load(each) for name, each in keys.items()}
        return found

    def polish(self, method: str, settings: Polish | None, source: Calibration, tokenizer: Any) -> None:
        """Train what a finished run made by one of its methods; nothing happens without settings, or if it was done.

        The first of several processes works, and the others wait. Errors of layers stay those before the training.
        """
        keys = polished_keys(method, settings, self.targets) if settings is not None else {}
        if settings is not None and distributed.rank() == 0 and not all(map(self.checkpoint.has, keys.values())):
            before = self.outcomes(method)
            weights = {name: one.dequantized for name, one in before.items() if one.dequantized is not None}
            found = {name: one.correction for name, one in before.items() if one.correction is not None}
            trained = settings.train(
                self.walk.model,
                self.layers,
                weights,
                {name: correction.factors for name, correction in found.items()},
                check_token_ids(self.walk.model, settings.windows(source, tokenizer)),
                source.dtype,
            )
            for name, (lora_B, lora_A) in trained.items():
                correction = replace(found[name], lora_A=lora_A, lora_B=lora_B)
                self.checkpoint.save(keys[name], replace(before[name], correction=correction))
        distributed.barrier()

    def compensated(self, method: str, layer: str) -> Tensor:
        """Return what a finished layer computes with in the quantized network: `Q + C`, or `Q`."""
        outcome = self.checkpoint.load(key(method, layer))
        if outcome.dequantized is None:
            raise RuntimeError(f"no weight of {layer} was kept")
        if outcome.correction is None:
            return outcome.dequantized
        return outcome.dequantized + outcome.correction.dense().to(outcome.dequantized.dtype)

    def _missing_here(self, layer: str) -> list[str]:
        return [method for method in self.methods if not self.checkpoint.has(key(method, layer))]

    def _missing(self, block: Block) -> set[str]:
        """Return the layers that no process has finished by all methods."""
        finished = distributed.gather({name for name in block.layers if not self._missing_here(name)})
        return set(block.layers) - set().union(*finished)

    def _share(self, block: Block) -> None:
        """Give every process each other's outcomes, unless they see the same files anyway."""
        keys = {key(method, name) for method in self.methods for name in block.layers}
        here = {each for each in keys if self.checkpoint.has(each)}
        lacking = keys.difference(keys.intersection(*distributed.gather(here)))
        for outcomes in distributed.gather({each: self.checkpoint.load(each) for each in sorted(lacking & here)}):
            for each, outcome in outcomes.items():
                if not self.checkpoint.has(each):
                    self.checkpoint.save(each, outcome)

    def _outcomes(self, block: Block, layer: Layer) -> Iterator[tuple[str, Outcome]]:
        """Yield each method that is missing and what it makes of a layer."""
        methods = {method: self.methods[method] for method in self._missing_here(layer.name)}
        inputs, start = block.statistics[layer.name], time.perf_counter()
        if layer.name not in self.targets:
            for name, method in methods.items():
                with named(layer.name):
                    stored = method.initializer.quantizer.for_layer(layer.name).quantize(layer.weight, inputs)
                yield name, Outcome(None, None, *self._kept(stored))
            return
        asymmetry = None
        results: Iterable[tuple[str, LayerInitialization]]
        if layer.name in block.paired:
            ((name, initializer),) = initializers(layer, methods).items()
            pair = block.paired[layer.name], block.held_out[layer.name]
            with named(layer.name), seeded(layer.name, self.seed):
                result, asymmetry = initialize_asymmetric(initializer, layer.weight, *pair, methods[name].trust)
            results = [(name, result)]
        else:
            results = initialize_layer(layer, inputs, methods, self.seed, self.sensitivities.get(layer.name))
        for name, result in results:
            spent, start = time.perf_counter() - start, time.perf_counter()
            record = LayerRecord.of(layer.name, result, layer.weight, block.tokens[layer.name], spent, asymmetry)
            keep = name in self.keep_weights or self.walk.inputs != "full"
            yield name, Outcome(record, Correction.of(result.low_rank), *(self._kept(result.quantized) if keep else ()))

    def _kept(self, stored: QuantizedWeight) -> tuple[Tensor, Mapping[str, Tensor]]:
        return stored.dequantize(), stored.packed() if self.keep_packed else {}


def key(method: str, layer: str) -> str:
    """Return the name of a layer's outcome in the checkpoint."""
    return f"{method}/{layer}" if method else layer


def polished_keys(method: str, polish: Polish, layers: Iterable[str]) -> dict[str, str]:
    """Return the name in the checkpoint of what training made of each layer."""
    return {layer: key(f"polished-{digest([repr(polish)])}", key(method, layer)) for layer in layers}


def cost(layer: Layer) -> float:
    """Return the work that a layer takes, relative to other layers: products of its error with its Gram."""
    rows, columns = layer.shape
    return float(rows * columns * columns)
