"""One run over all layers of a model, by one process or several, which can be resumed from its store."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

from torch import Tensor

from ..calibration.collector import LayerInputs
from ..calibration.examples import BlockExamples
from ..calibration.sources import CalibrationSource
from ..calibration.walk import Block, Walk
from ..core.weightings import Sensitivity
from ..errors import ConfigurationError, named
from ..layer.asymmetric import initialize_asymmetric
from ..layer.initializer import LayerInitialization
from ..layer.record import LayerRecord
from ..methods.distillation import Distillation
from ..methods.method import Method
from ..models.layers import Layer
from ..models.limits import check_token_ids
from ..models.weights import resident
from ..quantizers import QuantizedWeight
from ..support import distributed
from ..support.progress import Counter, counting, watched
from .keys import distilled_keys, distilling_key, key, trained_key
from .layerwise import cost, initialize_layer, initializers, quantize_alone, seeded
from .store import Store, StoredLayer, corrections_of, weights_of
from .trained_blocks import compensated, train_block, untrained

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class ModelRun:
    """Walks through a model once and keeps what becomes of every layer, by each method, in a store.

    Methods share statistics, quantized weights and what solvers find. On other inputs than `full` there can be only one
    method, because it decides what later layers see.

    Attributes:
        walk: the walk through the model, block by block; its layers are all layers to quantize that text reaches.
        targets: the layers that get a correction; the others are quantized only.
        methods: the methods by name. The name is the prefix of their keys in the store, and may be empty; see `key`.
        store: keeps finished layers, and holds those of an earlier run.
        keep_weights: names of the methods whose quantized weights of targets are kept in the store, too. Those of other
            layers, and all weights where inputs are not full, are always kept.
        keep_packed: whether they are also kept as a checkpoint has them.
        seed: seed of untrained directions.
        sensitivities: sensitivity of each target, for methods that need gradients.
        silent: layers of the base that no text reaches; they are quantized without statistics.
        seconds: what each block took, filled in on the way.
    """

    walk: Walk
    targets: Mapping[str, Layer]
    methods: Mapping[str, Method]
    store: Store
    keep_weights: Collection[str] = ()
    keep_packed: bool = False
    seed: int = 0
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    silent: Mapping[str, Layer] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether the blocks are trained, one after the other, as they are finished."""
        return any(method.blocks is not None for method in self.methods.values())

    @property
    def layers(self) -> dict[str, Layer]:
        """All layers that the run quantizes, those that no text reaches among them."""
        return {**self.walk.layers, **self.silent}

    def finish(self) -> None:
        """Finish every layer that is not finished yet.

        If files of finished blocks are gone, a second walk from block 0 makes them again.

        Raises:
            ConfigurationError: if there are several methods, and inputs are not full.

        See `Walk.run` for other errors.
        """
        if self.walk.inputs != "full" and len(self.methods) != 1:
            raise ConfigurationError(f"Expected one method on {self.walk.inputs} inputs, got {len(self.methods)}.")
        before = sum(not self._missing_here(layer) for layer in self.walk.layers)
        if before:
            logger.info("Going on: %d of %d layers are finished.", before, len(self.walk.layers))
        with counting("Initializing", len(self.walk.layers), before) as counter:
            blocks = self._go_through(replace(self.walk, on_batch=counter.describe), counter)
            if any(distributed.gather(self._has_gaps(blocks))):
                self._go_through(replace(self.walk, start=0, on_batch=counter.describe), counter)
        self._quantize_silent()

    def _go_through(self, walk: Walk, counter: Counter) -> Sequence[str]:
        """Go through the model once, make the layers that are missing, and return the names of its blocks."""
        start = time.perf_counter()

        def visit(block: Block) -> Mapping[str, Tensor]:
            nonlocal start
            weights = self._visit(block, counter)
            spent, start = time.perf_counter() - start, time.perf_counter()
            self.seconds[block.index] = round(self.seconds.get(block.index, 0.0) + spent, 3)
            if not watched():  # where nobody sees a progress bar
                logger.info("Block %d, %d layers: %.1f s.", block.index, len(block.layers), spent)
            return weights

        def train(examples: BlockExamples, names: Iterable[str]) -> Mapping[str, Tensor]:
            ((method_name, method),) = self.methods.items()
            assert method.blocks is not None
            counter.describe(f"Block {examples.index}: training")
            keys = {name: key(method_name, name) for name in names}
            # What a block was before its training stays in the store, so that a run which is killed trains it again
            # from exactly there.
            train_block(method.blocks, examples, self.layers, self.store, keys)
            self._share({trained_key(stored) for stored in keys.values()})
            return {name: compensated(self.store.load(self._latest(stored))) for name, stored in keys.items()}

        return walk.run(visit, train if self.trained else None)

    def _visit(self, block: Block, counter: Counter) -> Mapping[str, Tensor]:
        """Make the layers of a block that are missing; return what all of them compute with from now on."""
        counter.describe(f"Block {block.index}: layers")
        # Layers differ in cost by orders of magnitude, so they are not dealt out by number but by work.
        names = self._missing(block)
        mine = distributed.packed({name: cost(block.layers[name]) for name in names})
        for inputs in block.drain():
            name = inputs.layer.name
            if name in mine:
                for method_name, stored in self._made(inputs):
                    self.store.save(key(method_name, name), stored)
            if name in names:
                counter.advance()
        self._share({key(method_name, name) for method_name in self.methods for name in block.layers})
        if self.walk.inputs == "full":
            return {}
        (method_name,) = self.methods
        return {name: compensated(self.store.load(key(method_name, name))) for name in block.layers}

    def _quantize_silent(self) -> None:
        """Quantize the layers that no text reaches; with a quantizer that needs inputs they stay as they are.

        The first of several processes does it, which is the one that writes the base.
        """
        if not self.silent or distributed.rank() != 0:
            return
        for method_name, method in self.methods.items():
            quantizers = {
                name: method.initializer_of(layer).quantizer if method.base is None else method.base.quantizer
                for name, layer in self.silent.items()
            }
            waiting = [one for one in quantizers.values() if one is None or one.needs_calibration]
            if waiting:
                logger.warning(
                    "The base keeps %d layers that text never reaches in full precision: %r needs their inputs.",
                    len(waiting),
                    waiting[0],
                )
            for name, layer in self.silent.items():
                quantizer = quantizers[name]
                if quantizer is None or quantizer.needs_calibration:
                    continue
                if not self.store.has(key(method_name, name)):
                    with resident(layer.module):
                        stored = method.quantized(layer) or quantizer.quantize(layer.weight)
                    self.store.save(key(method_name, name), StoredLayer(None, None, *self._kept(stored)))

    def finished(self, method_name: str, distillation: Distillation | None = None) -> dict[str, StoredLayer]:
        """Return what a finished run made of each layer by one of its methods; tensors may be memory-mapped.

        Args:
            method_name: its name in `methods`.
            distillation: the training that followed, if any; see `distil`.
        """
        silent = [name for name in self.silent if self.store.has(key(method_name, name))]
        keys = {name: key(method_name, name) for name in (*self.walk.layers, *silent)}
        layers = {name: self.store.load(self._latest(stored)) for name, stored in keys.items()}
        if distillation is not None:
            keys = distilled_keys(method_name, distillation, self.targets)
            layers |= {name: self.store.load(stored) for name, stored in keys.items()}
        return layers

    def distil(
        self, method_name: str, distillation: Distillation | None, source: CalibrationSource, tokenizer: Any
    ) -> None:
        """Train the corrections of a finished run together, unless this was done before; keep the trained ones, too.

        The first of several processes trains, and the others wait. Errors of layers remain those before the training.

        Args:
            method_name: name of the method in `methods` whose corrections are trained.
            distillation: settings of the training; nothing is trained if None.
            source: what the training draws its text from.
            tokenizer: tokenizer of the model.
        """
        keys = distilled_keys(method_name, distillation, self.targets) if distillation is not None else {}
        if distillation is not None and distributed.rank() == 0 and not all(map(self.store.has, keys.values())):
            # Weights and corrections come from the store and not from memory, so that a run which ended after its last
            # layer can go on with the training alone.
            before, state = self.finished(method_name), distilling_key(method_name, distillation)
            trained = distillation.train(
                self.walk.model,
                self.layers,
                weights_of(before),
                corrections_of(before),
                check_token_ids(self.walk.model, distillation.windows(source, tokenizer)),
                source.dtype,
                self.store.load(state).packed if self.store.has(state) else None,
                partial(self._keep, state) if self.store.outlives else None,
            )
            for name, correction in trained.items():
                self.store.save(keys[name], replace(before[name], correction=correction))
            if self.store.has(state):
                self._keep(state, {})
        distributed.barrier()

    def _keep(self, stored: str, tensors: Mapping[str, Tensor]) -> None:
        self.store.save(stored, StoredLayer(packed=tensors))

    def _latest(self, stored: str) -> str:
        """Return the key of a layer after the training of its block, where there was one."""
        return trained_key(stored) if self.store.has(trained_key(stored)) else stored

    def _missing_here(self, layer: str) -> list[str]:
        return [name for name in self.methods if not self.store.has(key(name, layer))]

    def _has_gaps(self, blocks: Sequence[str]) -> bool:
        """Return whether layers are missing after a walk, or what the training of their block has made of them."""
        keys = {name: key(method, name) for method in self.methods for name in self.walk.layers}
        lost = self.trained and untrained(self.walk.layers, blocks, self.store, keys)
        return lost or any(map(self._missing_here, self.walk.layers))

    def _missing(self, block: Block) -> set[str]:
        """Return the layers that no process has finished by all methods."""
        finished = distributed.gather({name for name in block.layers if not self._missing_here(name)})
        return set(block.layers) - set().union(*finished)

    def _share(self, keys: set[str]) -> None:
        """Give every process what the others have of some layers, unless all of them see the same files."""
        # On a shared file system nothing is lacking and nothing is sent. Hosts with folders of their own need the
        # layers of other processes too: to write the adapter, and for the inputs of later layers.
        here = {one for one in keys if self.store.has(one)}
        lacking = keys.difference(keys.intersection(*distributed.gather(here)))
        for layers in distributed.gather({one: self.store.load(one) for one in sorted(lacking & here)}):
            for one, stored in layers.items():
                if not self.store.has(one):
                    self.store.save(one, stored)

    def _made(self, inputs: LayerInputs) -> Iterator[tuple[str, StoredLayer]]:
        """Yield each method that is missing and what it makes of a layer."""
        layer, start = inputs.layer, time.perf_counter()
        methods = {name: self.methods[name] for name in self._missing_here(layer.name)}
        if layer.name not in self.targets:
            for name, method in methods.items():
                with named(layer.name):
                    quantized = quantize_alone(inputs, method)
                yield name, StoredLayer(None, None, *self._kept(quantized))
            return
        for name, result, asymmetry in self._initialized(inputs, methods):
            spent, start = time.perf_counter() - start, time.perf_counter()
            rank = methods[name].rank_of(layer.group)
            record = LayerRecord.of(layer.name, result, layer.weight, inputs.tokens, rank, spent, asymmetry)
            keep = name in self.keep_weights or self.walk.inputs != "full"
            kept = self._kept(result.quantized) if keep else ()
            yield name, StoredLayer(record, result.correction, *kept)

    def _initialized(
        self, inputs: LayerInputs, methods: Mapping[str, Method]
    ) -> Iterator[tuple[str, LayerInitialization, float | None]]:
        """Yield for each method its name, the initialization of a layer, and the asymmetry.

        The asymmetry says how far the target moved from W towards the asymmetric one, from 0 to 1; None on full inputs.
        """
        layer = inputs.layer
        if inputs.paired is None:
            sensitivity = self.sensitivities.get(layer.name)
            for name, result in initialize_layer(layer, inputs.statistics, methods, self.seed, sensitivity):
                yield name, result, None
            return
        ((name, initializer),) = initializers(layer, methods).items()
        pair = inputs.paired.all_tokens, inputs.paired.held_out
        with named(layer.name), seeded(layer.name, self.seed):
            quantized = methods[name].quantized(layer)
            result, asymmetry = initialize_asymmetric(initializer, layer.weight, *pair, methods[name].step, quantized)
        yield name, result, asymmetry

    def _kept(self, stored: QuantizedWeight) -> tuple[Tensor, Mapping[str, Tensor]]:
        return stored.dequantize(), stored.packed() if self.keep_packed or any(
            method.trains_base for method in self.methods.values()
        ) else {}
