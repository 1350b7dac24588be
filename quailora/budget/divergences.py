"""Measure what errors cost: the divergence of predictions with a coarser base in one layer after the other."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from ..calibration.tokens import CalibrationTokens
from ..errors import ModelError
from ..evaluation.scores import measure
from ..models.files import read_json
from ..models.layers import Layer, block_of
from ..models.load import LoadedModel
from ..pipeline.store import Store, StoredLayer
from ..support.files import write_json
from .question import Question

logger = logging.getLogger("quailora")

DIVERGENCE_TOKENS = 2048
"""Held-out tokens that predictions are compared on, once for each layer."""

ERRORS, PROBE = "errors", "probe"
"""What is kept of each layer beside its weight in the reference network."""


def weight_in(stored: StoredLayer) -> Tensor:
    """Return the weight of a layer in the reference network."""
    assert stored.dequantized is not None  # every layer is kept with it
    return stored.dequantized


def held_out_windows(tokens: CalibrationTokens) -> Int[Tensor, "windows length"]:
    """Return some of the windows that the walk holds out, of `DIVERGENCE_TOKENS` tokens together at least."""
    # Held out, because the reference network is fitted to the others. All layers are compared on the same windows, so
    # that a few thousand tokens are enough.
    batches, held_from = tokens.batches(1, hold_out=True)
    ids = torch.cat([batch.ids for batch in batches[held_from:]])
    return ids[: -(-DIVERGENCE_TOKENS // ids.shape[1])]


def measure_divergences(
    question: Question,
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "windows length"],
    store: Store,
) -> tuple[float, dict[str, float]]:
    """Return the divergence of the reference network, and that with the probe in each layer.

    Divergences are those of the predictions from full precision, as means over tokens, in nats.
    """
    stored = {name: store.load(name) for name in layers}
    reference = {name: weight_in(one) for name, one in stored.items()}
    # One layer at a time is measured in a network that is quantized as a whole. Upstream of it, inputs are then as far
    # off as they will be in the end, and so is what downstream layers do with its errors.
    found = Found(store.folder_for("divergences") / "found.json")
    logger.info(
        "Measuring what errors cost: %d layers, one at a time with %s in a network with %s.",
        len(layers),
        question.probe.title,
        question.reference.title,
    )
    for names in in_blocks(layers):
        if all(name in found.values for name in names):
            continue
        variants: dict[str, Mapping[str, Tensor]] = {
            name: ChainMap({name: stored[name].packed[PROBE]}, reference) for name in names
        }
        if "" not in found.values:
            variants[""] = reference
        block = block_of(names[0]) or names[0]
        scores = measure(loaded.model, layers, variants, windows, f"Measuring {block}")
        found.add({name: score.divergence for name, score in scores.items()})
    return found.values[""], {name: found.values[name] for name in layers}


def in_blocks(layers: Mapping[str, Layer]) -> Iterator[list[str]]:
    """Yield the names of the layers of each block."""
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(block_of(name), []).append(name)
    yield from blocks.values()


@final
class Found:
    """Divergences that were measured, kept in a file after each block.

    Args:
        file: the file, which may hold those of an earlier process.

    Raises:
        ModelError: if the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, float] = {}
        if file.is_file():
            try:
                self.values = {name: float(value) for name, value in read_json(file).items()}
            except (TypeError, ValueError) as error:
                raise ModelError(f"{file} is damaged ({error}). Start again with `fresh=True`.") from error

    def add(self, values: Mapping[str, float]) -> None:
        """Keep more of them."""
        self.values |= values
        write_json(self._file, self.values)
