"""The formats of the layers of a base, told from small examples before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import cache
from types import MappingProxyType

import torch

from ..core.statistics import InputStatistics
from ..errors import ConfigurationError, TargetError
from ..methods.method import Method
from ..models.layers import Layer, kind
from ..quantizers import QuantizedWeight, Quantizer

FULL_BITS = 16
"""Bits of a number of an adapter, and of a weight in full precision, where its dtype has as many."""

_SAMPLE = 64, 1024  # of a weight, to count the bits of a quantizer
_SIDE = 256  # rows and columns of a layer that the codes of every format fill


def example_of(method: Method, layer: Layer) -> QuantizedWeight:
    """Return a quantized weight in the format of a layer: that of the base, or a small random one."""
    if method.base is not None:
        return method.base.weight(layer.name, torch.float32)
    quantizer = method.initializer_of(layer).quantizer
    assert quantizer is not None  # or a base, which `Method.check` sees to
    return example_by(quantizer, layer.shape)


@cache
def example_by(quantizer: Quantizer, shape: tuple[int, int]) -> QuantizedWeight:
    """Return a small random weight in the format that a quantizer gives a layer of a shape; it is made once."""
    # A few rows and columns have as many bits each as the whole layer, and take no time.
    rows, columns = (min(side, limit) for side, limit in zip(shape, _SAMPLE, strict=True))
    statistics = InputStatistics(columns)
    statistics.add(torch.eye(columns, dtype=torch.float64), 1)
    sample = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return quantizer.quantize(sample, statistics)


def tensors_in_checkpoints(quantizer: Quantizer) -> frozenset[str]:
    """Return the tensors that checkpoints hold of a layer of usual size; none where no checkpoint holds its codes."""
    return frozenset(example_by(quantizer, (_SIDE, _SIDE)).packed())


def full_bits(layer: Layer) -> int:
    """Return the bits of each weight of a layer in full precision, by its dtype, in which a base keeps it."""
    return 8 * layer.weight.element_size()


def bits_of_layers(
    layers: Mapping[str, Layer], method: Method, known: Mapping[str, float] = MappingProxyType({})
) -> float:
    """Return the stored bits per weight of several layers together, those that are kept in full precision among them.

    Args:
        layers: the layers.
        method: how they are quantized.
        known: stored bits per weight of some of them; of others they are those of an example.
    """
    examples: dict[Hashable, float] = {}
    bits = dict(known) | {name: float(full_bits(layers[name])) for name in method.kept & layers.keys()}
    for name, layer in layers.items():
        if name not in bits:
            # A weight of a base that is there already takes time to read, so that one stands for those like it.
            alike = kind(name), layer.shape, method.quantizers.get(name, method.quantizer)
            if alike not in examples:
                examples[alike] = example_of(method, layer).bits_per_weight
            bits[name] = examples[alike]
    sizes = {name: math.prod(layer.shape) for name, layer in layers.items()}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def check_single_layers(method: Method, layers: Mapping[str, Layer]) -> None:
    """Raise a `TargetError` if a method has quantizers for other layers than the model has, or a plan knows others.

    Args:
        method: how layers are quantized.
        layers: the linear layers of the model.
    """
    unknown = [name for name in method.quantizers if name not in layers]
    if unknown:
        raise TargetError(
            f"Expected quantizers for linear layers of this model, got some for {unknown[0]!r} and {len(unknown) - 1} "
            f"others that it does not have. Its first linear layer is {next(iter(layers), 'missing')}. A budget plan "
            "belongs to the model that it was made for."
        )
    sizes = {name: math.prod(layer.shape) for name, layer in layers.items()}
    missing = [name for name in sizes if method.planned and method.planned.get(name) != sizes[name]]
    if missing:
        raise TargetError(
            f"The budget plan does not know {len(missing)} of the {len(layers)} linear layers of this model, or knows "
            f"them in another size, {missing[0]} among them. A plan belongs to the model that it was made for: plan "
            "again."
        )


def examples_of_base(method: Method, layers: Mapping[str, Layer]) -> list[QuantizedWeight]:
    """Return an example for each quantizer of a base, all of formats that one checkpoint can hold.

    Args:
        method: how layers are quantized.
        layers: the layers that get a correction.

    Raises:
        ConfigurationError: if no checkpoint holds layers of all these formats.
    """
    first = next(iter(layers.values()))
    if len(method.every_quantizer) < 2:
        return [example_of(method, first)]
    # AutoGPTQ's format has bits and groups for each layer, in gptqmodel's `dynamic`. Checkpoints of other formats have
    # one configuration for all layers that are quantized.
    examples = {quantizer: example_by(quantizer, first.shape) for quantizer in method.every_quantizer}
    others = [quantizer for quantizer, example in examples.items() if "qweight" not in example.packed()]
    if others:
        raise ConfigurationError(
            f"A checkpoint holds layers of several formats only where all are in AutoGPTQ's, which {others[0]!r} is "
            "not. Take Uniform or GPTQ of 2, 3, 4 or 8 bits for each layer, or one quantizer for all."
        )
    return list(examples.values())
