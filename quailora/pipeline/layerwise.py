"""Every layer of a model in turn, under one method or several that share what they can."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import final

import torch

from ..calibration.walk import Block, Walk
from ..core.statistics import InputStatistics
from ..errors import ConfigurationError, named
from ..layer.initializer import Initializer, LayerInitialization
from ..layer.record import LayerRecord
from ..methods.method import Method
from ..models.layers import Layer
from ..solvers import LowRank
from ..solvers.fisher import Sensitivity
from ..support.progress import track


@final
@dataclass(frozen=True)
class MethodResult:
    """What the adapter and the report need.

    Attributes:
        records: errors of each layer, in the order of the model.
        corrections: low-rank correction of each layer.
    """

    records: list[LayerRecord] = field(default_factory=list)
    corrections: dict[str, LowRank] = field(default_factory=dict)


def run_methods(
    blocks: Iterable[Block], methods: Mapping[str, Method], total: int | None = None, seed: int = 0
) -> dict[str, MethodResult]:
    """Initialize all layers by each method, on the inputs of the full-precision model.

    A layer is quantized once for each quantizer; solvers and ranks share what they find, highest rank first. What
    depends on the inputs alone is kept while consecutive layers have the same inputs.

    Args:
        blocks: a `Walk`, or blocks with their statistics.
        methods: what to do, by name.
        total: number of layers, for the progress bar.
        seed: seed of untrained directions; each layer and method draws from its own generator, whatever came before.

    Raises:
        ConfigurationError: if the walk is on other inputs, or a method trains the whole model afterwards: `init` and
            `compare` can do that.
        QuailoraError: as the initializer does, with the layer's name in front.
    """
    trained = [name for name, method in methods.items() if method.polish is not None]
    other = isinstance(blocks, Walk) and blocks.inputs != "full"
    if trained or other:
        raise ConfigurationError(
            "Expected methods without training, on full-precision inputs, got "
            f"{f'the training of {trained[0]!r}' if trained else 'a walk on other inputs'}. Use quailora.init."
        )
    results = {name: MethodResult() for name in methods}
    for block, layer in track(layers_of(blocks), "Initializing", total):
        inputs = block.statistics[layer.name]
        for name, result in initialize_layer(layer, inputs, methods, seed):
            results[name].records.append(LayerRecord.of(layer.name, result, layer.weight, block.tokens[layer.name]))
            results[name].corrections[layer.name] = result.low_rank
    return results


def layers_of(blocks: Iterable[Block]) -> Iterator[tuple[Block, Layer]]:
    """Yield each layer with its block; statistics are freed when their last layer has been."""
    for block in blocks:
        previous: InputStatistics | None = None
        for name, layer in block.layers.items():
            inputs = block.statistics[name]
            if previous is not None and previous is not inputs:
                previous.clear_cache()
            previous = inputs
            yield block, layer
            del block.statistics[name], inputs
            block.paired.pop(name, None)
            block.held_out.pop(name, None)
        if previous is not None:
            previous.clear_cache()


def initialize_layer(
    layer: Layer,
    inputs: InputStatistics,
    methods: Mapping[str, Method],
    seed: int,
    sensitivity: Sensitivity | None = None,
) -> Iterator[tuple[str, LayerInitialization]]:
    """Yield each method's name and the initialization of one layer; see `run_methods`."""
    prepared = {}
    for name, initializer in initializers(layer, methods).items():
        with named(layer.name), seeded(layer.name, seed):
            if initializer.quantizer not in prepared:
                prepared[initializer.quantizer] = initializer.quantize(layer.weight, inputs, sensitivity)
            result = initializer.correct(prepared[initializer.quantizer])
        yield name, result


def initializers(layer: Layer, methods: Mapping[str, Method]) -> dict[str, Initializer]:
    """Return the initializer of each method with quantizer and rank of a layer, highest rank first."""
    own = {
        name: replace(
            method.initializer,
            rank=method.scaling.rank_of(layer.group),
            quantizer=method.initializer.quantizer.for_layer(layer.name),
        )
        for name, method in methods.items()
    }
    return dict(sorted(own.items(), key=lambda item: -item[1].rank))


@contextmanager
def seeded(layer: str, seed: int) -> Iterator[None]:
    """Seed torch's generator for one layer inside a `with` statement, whatever came before.

    It is the generator of the CPU. Layers draw from no other, so that a draw is the same for every device; those of the
    caller's other devices are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed ^ zlib.crc32(layer.encode()))
        yield
