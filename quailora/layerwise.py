"""Every layer of a model in turn, under one method or several that share what they can."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import nn

from .adapters.lora import LoraScaling
from .errors import QuailoraError
from .initializer import Initializer, LayerInitialization
from .models.layers import weight_of
from .progress import track
from .report.record import LayerRecord
from .solvers import LowRank
from .statistics import InputStatistics


@final
@dataclass(frozen=True)
class Method:
    """What to do with each layer.

    Attributes:
        initializer: quantizer, metric and solver; its rank is replaced by the layer's own.
        scaling: rank of each layer.
    """

    initializer: Initializer
    scaling: LoraScaling


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
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, InputStatistics],
    methods: Mapping[str, Method],
    seed: int = 0,
) -> dict[str, MethodResult]:
    """Initialize all layers by each method; see `initialize_layers`."""
    results = {name: MethodResult() for name in methods}
    for layer_name, method_name, layer in initialize_layers(layers, statistics, methods, seed):
        results[method_name].records.append(LayerRecord.of(layer_name, layer, statistics[layer_name].tokens))
        results[method_name].corrections[layer_name] = layer.low_rank
    return results


def initialize_layers(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, InputStatistics],
    methods: Mapping[str, Method],
    seed: int = 0,
) -> Iterator[tuple[str, str, LayerInitialization]]:
    """Yield each layer's name, each method's name and the initialization, in the order of the model.

    A layer is quantized once for each quantizer; solvers and ranks share what they find, highest rank first. What
    depends on the inputs alone is kept while consecutive layers have the same inputs.

    Args:
        layers: modules by name.
        statistics: inputs of each layer.
        methods: what to do, by name.
        seed: seed of untrained directions; each layer and method draws from its own generator, whatever came before.

    Raises:
        QuailoraError: as the initializer does, with the layer's name in front.
    """
    previous: InputStatistics | None = None
    for name, module in track(layers.items(), "Initializing", total=len(layers)):
        inputs = statistics[name]
        if previous is not None and previous is not inputs:
            previous.forget()
        previous = inputs
        try:
            for method, layer in _initialize(weight_of(name, module), inputs, ranked(name, methods), name, seed):
                yield name, method, layer
        except QuailoraError as error:
            raise type(error)(f"Layer {name}: {error}") from error
    if previous is not None:
        previous.forget()


def ranked(layer: str, methods: Mapping[str, Method]) -> dict[str, Initializer]:
    """Return the initializer of each method with the layer's own rank, highest rank first."""
    own = {name: replace(method.initializer, rank=method.scaling.rank_of(layer)) for name, method in methods.items()}
    return dict(sorted(own.items(), key=lambda item: -item[1].rank))


def _initialize(
    weight: torch.Tensor, inputs: InputStatistics, initializers: Mapping[str, Initializer], name: str, seed: int
) -> Iterator[tuple[str, LayerInitialization]]:
    prepared = {}
    for method, initializer in initializers.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed ^ zlib.crc32(name.encode()))
            if initializer.quantizer not in prepared:
                prepared[initializer.quantizer] = initializer.quantize(weight, inputs)
            layer = initializer.correct(prepared[initializer.quantizer])
        yield method, layer
