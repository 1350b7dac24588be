"""One layer of a model under several methods, which share what they can."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..calibration.collector import LayerInputs
from ..core.statistics import InputStatistics
from ..core.weightings import Sensitivity
from ..errors import named
from ..layer.asymmetric import asymmetric_layer
from ..layer.initializer import Initializer, LayerInitialization
from ..methods.method import Method
from ..models.layers import Layer
from ..quantizers import QuantizedWeight, Quantizer
from ..schedules.layer import QuantizedLayer


def initialize_layer(
    layer: Layer,
    inputs: InputStatistics,
    methods: Mapping[str, Method],
    seed: int,
    sensitivity: Sensitivity | None = None,
) -> Iterator[tuple[str, LayerInitialization]]:
    """Yield each method's name and the initialization of one layer, on the inputs of the full-precision model.

    The layer is quantized once for each quantizer; solvers and ranks share what they find, highest rank first.

    Args:
        layer: the layer, resident.
        inputs: statistics of its inputs.
        methods: what to do, by name.
        seed: seed of untrained directions; each layer and method draws from a generator of its own.
        sensitivity: sensitivity of the layer, for methods that need gradients.

    Raises:
        QuailoraError: as the initializer does, with the layer's name in front.
    """
    # Highest rank first: what a search has found for it contains the solutions of all lower ranks.
    prepared: dict[Quantizer | None, QuantizedLayer] = {}
    for name, initializer in initializers(layer, methods).items():
        with named(layer.name), seeded(layer.name, seed):
            if initializer.quantizer not in prepared:
                quantized = methods[name].quantized(layer)
                prepared[initializer.quantizer] = initializer.quantize(layer.weight, inputs, sensitivity, quantized)
            result = initializer.correct(prepared[initializer.quantizer])
        yield name, result


def quantize_alone(inputs: LayerInputs, method: Method) -> QuantizedWeight:
    """Return the quantized weight of a layer that gets no correction.

    Where held-out tokens choose among roundings, they do so for this layer as well: a base whose other layers are
    rounded to nearest would be worse in these.

    Args:
        inputs: the layer, resident, and what is known of its inputs.
        method: how the model is quantized.
    """
    layer, given = inputs.layer, method.quantized(inputs.layer)
    initializer = method.initializer_of(layer)
    alone = initializer.schedule.alone()
    base = initializer.base(given)
    if not isinstance(base, Quantizer):
        return base
    if alone is None or (alone.needs_validation and inputs.paired is None):  # experts have no held-out tokens
        return base.quantize(layer.weight, inputs.statistics)
    if inputs.paired is None:
        return initializer.base_alone(initializer.quantize(layer.weight, inputs.statistics))
    pair = inputs.paired.all_tokens, inputs.paired.held_out
    return initializer.base_alone(asymmetric_layer(initializer, layer.weight, *pair, method.step)[0])


def initializers(layer: Layer, methods: Mapping[str, Method]) -> dict[str, Initializer]:
    """Return the initializer of each method with the rank and the quantizer of a layer, highest rank first."""
    ranked = {name: method.initializer_of(layer) for name, method in methods.items()}
    return dict(sorted(ranked.items(), key=lambda item: -item[1].rank))


@contextmanager
def seeded(layer: str, seed: int) -> Iterator[None]:
    """Seed torch's generator for one layer inside a `with` statement, whatever came before.

    It is the generator of the CPU. Layers draw from no other, so that a draw is the same for every device; those of the
    caller's other devices are left alone.
    """
    # The name of the layer is part of the seed, so that a layer gets the same numbers whether others were made before
    # it or not: in a resumed run, by another process, or in a comparison with other methods.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed ^ zlib.crc32(layer.encode()))
        yield


def cost(layer: Layer) -> float:
    """Return the work that a layer takes, relative to other layers: products of its error with its Gram."""
    # E H takes rows * columns^2 products, and dominates decompositions and quantization in wide layers.
    rows, columns = layer.shape
    return float(rows * columns * columns)
