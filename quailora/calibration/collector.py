"""Statistics of the layers of one block, from the inputs of many batches and processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from ..core.paired import PairedStatistics
from ..core.statistics import InputStatistics
from ..errors import CalibrationError, named
from ..models.layers import Layer
from ..support import distributed
from .capture import Inputs, shared_inputs

Kind = TypeVar("Kind", InputStatistics, PairedStatistics)


@final
@dataclass(frozen=True, eq=False)
class PairedInputs:
    """Statistics of the inputs of a layer in two networks.

    Attributes:
        all_tokens: statistics of all tokens.
        held_out: statistics of the held-out tokens, which are part of `all_tokens` as well.
    """

    all_tokens: PairedStatistics
    held_out: PairedStatistics


@final
@dataclass(frozen=True, eq=False)
class LayerInputs:
    """A layer, and what calibration knows of its inputs.

    Attributes:
        layer: the layer.
        statistics: statistics of its inputs; layers with the same input share one object.
        tokens: calibration tokens that it saw.
        paired: for asymmetric inputs, statistics of both networks, of which `statistics` is a part. None for experts.
    """

    layer: Layer
    statistics: InputStatistics
    tokens: int
    paired: PairedInputs | None = None


@final
class StatisticsCollector(Generic[Kind]):
    """Adds up inputs. Layers that are run on the very same tensors (query, key and value) share one object.

    Args:
        kind: class of the statistics.
        device: the device that inputs are on.
    """

    def __init__(self, kind: type[Kind], device: torch.device) -> None:
        self._kind: type[Kind] = kind
        self._device = device
        self._found: dict[tuple[str, ...], Kind] = {}

    def add(self, inputs: Mapping[str, Sequence[tuple[Tensor, ...]]], counted: Tensor | None = None) -> None:
        """Add the inputs of one batch.

        Args:
            inputs: what each layer was run on, call by call, as `update` of the statistics takes it.
            counted: the tokens of the batch that count, shape (samples, length); all of them if None.

        Raises:
            CalibrationError: if some tokens do not count, and a layer sees others than all tokens of the batch.
            NumericalError: if one is NaN or infinite; the message names its layer.
        """
        tensors = {name: [tensor for call in calls for tensor in call] for name, calls in inputs.items()}
        for names in shared_inputs(tensors):
            for call in inputs[names[0]]:
                if names not in self._found:
                    self._found[names] = self._kind(call[-1].shape[-1], self._device)
                with named(names[0]):
                    self._found[names].update(*(among_counted(tensor, counted) for tensor in call))

    def result(self, layers: Mapping[str, Layer]) -> tuple[dict[str, Kind], dict[str, int]]:
        """Return the statistics of each layer that saw a token, and the tokens that it saw, over all processes.

        Raises:
            CalibrationError: if a layer, or every expert of a fused parameter, saw no token.
        """
        # A layer that is run on several tensors in one batch (an expert, a layer that is called twice) has a part for
        # each set of layers that it shared a tensor with; its statistics are those of all parts together.
        every = self._over_all_processes()
        self._found = {}  # whoever gets them decides when they are freed
        parts: dict[str, list[Kind]] = defaultdict(list)
        for names, statistics in every.items():
            for name in names:
                parts[name].append(statistics)
        silent = [name for name, layer in layers.items() if name not in parts and layer.expert is None]
        groups = {layer.group for name, layer in layers.items() if name in parts}
        if silent:
            raise CalibrationError(
                f"{len(silent)} layers received no calibration token, {silent[0]} among them. "
                "Leave them out of the targets, or calibrate on more text."
            )
        unseen = dict.fromkeys(layer.group for layer in layers.values() if layer.group not in groups)
        if unseen:
            raise CalibrationError(
                f"No token was seen on its way into {next(iter(unseen))}, nor into {len(unseen) - 1} others like it: "
                "these are no experts that are multiplied one by one. Leave them out of the targets, with all-linear."
            )
        found = {name: reduce(self._kind.merge, parts[name]) for name in layers if name in parts}
        tokens = {name: found[name].tokens if name in found else 0 for name in layers}
        return found, tokens

    def _over_all_processes(self) -> dict[tuple[str, ...], Kind]:
        if distributed.world_size() == 1:
            return self._found
        # Another process may have seen tokens for experts that got none here. All have to take part in every sum, in
        # the same order, so that the keys are gathered first and sorted.
        widths: dict[tuple[str, ...], int] = {}
        for part in distributed.gather({names: found.in_features for names, found in self._found.items()}):
            widths |= part
        for names in sorted(widths):
            found = self._found.setdefault(names, self._kind(widths[names], self._device))
            found.pool(distributed.add_up, distributed.gather)
        return self._found


@final
class BlockCollector:
    """Adds up the inputs of the layers of a block, in one network or, token by token, in two.

    Experts have the inputs of one network in any case: two do not send the same tokens to them.

    Args:
        layers: the layers.
        device: the device that inputs are on.
        paired: whether other layers have the inputs of both.
    """

    def __init__(self, layers: Mapping[str, Layer], device: torch.device, *, paired: bool) -> None:
        self._layers = layers
        self._linear = {name: layer for name, layer in layers.items() if paired and layer.expert is None}
        self._alone = StatisticsCollector(InputStatistics, device)
        self._seen, self._held = (
            StatisticsCollector(PairedStatistics, device),
            StatisticsCollector(PairedStatistics, device),
        )

    def add(self, inputs: Inputs, full: Inputs, counted: Tensor | None = None, *, held_out: bool) -> None:
        """Add the inputs of one batch.

        Args:
            inputs: inputs in the network that layers are fitted in.
            full: inputs in the full-precision network.
            counted: the tokens of the batch that count; all of them if None.
            held_out: whether the batch is held out.

        Raises:
            NumericalError: if one is NaN or infinite; the message names its layer.
        """
        pairs = {name: list(zip(full[name], inputs[name], strict=True)) for name in self._linear if name in inputs}
        (self._held if held_out else self._seen).add(pairs, counted)
        alone = {name: [(tensor,) for tensor in calls] for name, calls in inputs.items() if name not in pairs}
        self._alone.add(alone, counted)

    def result(self) -> dict[str, LayerInputs]:
        """Return what is known of the inputs of each layer, in the order of the layers.

        Raises:
            CalibrationError: if a layer, or every expert of a fused parameter, saw no token.
        """
        others = {name: layer for name, layer in self._layers.items() if name not in self._linear}
        statistics, tokens = self._alone.result(others)
        support_rare_experts(self._layers, statistics)
        alone = {name: LayerInputs(self._layers[name], statistics[name], tokens[name]) for name in others}
        if not self._linear:
            return alone
        pairs, seen = self._seen.result(self._linear)
        held_out, held = self._held.result(self._linear)
        # Layers with the same input share one object, into which the held-out tokens go once.
        for one, other in {id(pairs[name]): (pairs[name], held_out[name]) for name in pairs}.values():
            one.include(other)
        paired = {
            name: LayerInputs(
                self._layers[name], pair.quantized, seen[name] + held[name], PairedInputs(pair, held_out[name])
            )
            for name, pair in pairs.items()
        }
        return {name: alone[name] if name in alone else paired[name] for name in self._layers}


def among_counted(inputs: Tensor, counted: Tensor | None) -> Tensor:
    """Return those inputs of a layer that belong to tokens which count.

    Args:
        inputs: shape (samples, length, in_features), or with samples and length in one dimension.
        counted: shape (samples, length); every token counts if it is None.

    Raises:
        CalibrationError: if the layer saw a part of the tokens only, since it is not known which of them count.
    """
    if counted is None:
        return inputs
    if math.prod(inputs.shape[:-1]) != counted.numel():
        raise CalibrationError(
            f"Some calibration tokens do not count, and this layer saw {math.prod(inputs.shape[:-1])} of the "
            f"{counted.numel()} tokens of a batch, as experts do. Pass batches in which every token counts, or leave "
            "these layers out of the targets."
        )
    return inputs.reshape(-1, inputs.shape[-1])[counted.flatten().to(inputs.device)]


def support_rare_experts(layers: Mapping[str, Layer], found: dict[str, InputStatistics]) -> None:
    """Give each expert as many tokens of the average expert as its input is wide, on top of its own.

    The second moment of a few tokens says nothing about most directions. An expert that saw no token gets the average
    of those that did; one that saw many times its width hardly changes.
    """
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers.values():
        if layer.expert is not None:
            groups[layer.group].append(layer)
    for members in groups.values():
        # A prior of as many tokens as the input is wide, in the manner of shrinkage towards a mean: it outweighs an
        # expert that has seen fewer, and is outweighed by one that has seen many times as many.
        pool = reduce(InputStatistics.merge, [found[layer.name] for layer in members if layer.name in found])
        for layer in members:
            width = pool.in_features
            statistics = found.setdefault(layer.name, InputStatistics(width, pool.second_moment.device))
            total = None if pool.mean is None else pool.mean * width
            statistics.add(pool.second_moment * width, width, pool.mean_magnitude * width, total)
