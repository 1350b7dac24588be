"""Statistics of the layers of one block, from the inputs of many batches and processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from typing import final

import torch

from .. import distributed
from ..errors import CalibrationError, named
from ..statistics import InputStatistics
from .capture import Inputs, shared_inputs
from .layers import Layer


@final
class Tally:
    """Adds up inputs. Layers that are run on the very same tensors (query, key and value) share one object.

    Args:
        device: where inputs are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[tuple[str, ...], InputStatistics] = {}

    def add(self, inputs: Inputs) -> None:
        """Add the inputs of one batch.

        Raises:
            NumericalError: if one is NaN or infinite; the message names its layer.
        """
        for names in shared_inputs(inputs):
            for tensor in inputs[names[0]]:
                if names not in self._found:
                    self._found[names] = InputStatistics(tensor.shape[-1], self._device)
                with named(names[0]):
                    self._found[names].update(tensor)

    def result(self, layers: Mapping[str, Layer]) -> tuple[dict[str, InputStatistics], dict[str, int]]:
        """Return the statistics of each layer, and the tokens that it saw, over all processes.

        Raises:
            CalibrationError: if a layer, or every expert of a fused parameter, saw no token.
        """
        every = self._over_all_processes()
        self._found = {}  # whoever gets them decides when they are freed
        parts: dict[str, list[InputStatistics]] = defaultdict(list)
        for names, statistics in every.items():
            for name in names:
                parts[name].append(statistics)
        silent = [name for name, layer in layers.items() if name not in parts and layer.expert is None]
        groups = {layer.group for name, layer in layers.items() if name in parts}
        silent += [layer.group for layer in layers.values() if layer.group not in groups and layer.expert is not None]
        if silent:
            raise CalibrationError(
                f"{len(silent)} layers received no calibration token, {silent[0]} among them. "
                "Leave them out of the targets, or calibrate on more text."
            )
        found = {name: reduce(InputStatistics.merge, parts[name]) for name in layers if name in parts}
        tokens = {name: found[name].tokens if name in found else 0 for name in layers}
        support_rare_experts(layers, found)
        return found, tokens

    def _over_all_processes(self) -> dict[tuple[str, ...], InputStatistics]:
        if distributed.world_size() == 1:
            return self._found
        widths: dict[tuple[str, ...], int] = {}
        for part in distributed.gather({names: found.in_features for names, found in self._found.items()}):
            widths |= part
        summed = {}
        for names in sorted(widths):
            own = self._found.pop(names, None)
            total = own or InputStatistics(widths[names], self._device)
            product = distributed.add_up(total.sum_of_products())
            magnitude = distributed.add_up(total.mean_magnitude * total.tokens)
            tokens = distributed.add_up(torch.tensor(total.tokens, device=self._device))
            summed[names] = InputStatistics(widths[names], self._device)
            summed[names].add(product, int(tokens), magnitude)
        return summed


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
        pool = reduce(InputStatistics.merge, [found[layer.name] for layer in members if layer.name in found])
        for layer in members:
            width = pool.in_features
            statistics = found.setdefault(layer.name, InputStatistics(width, pool.second_moment.device))
            statistics.add(pool.second_moment * width, width, pool.mean_magnitude * width)
