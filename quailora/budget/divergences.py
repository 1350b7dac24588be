"""Measure what errors cost: the divergence of predictions with more of an error in one layer after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..calibration.blocks import Call, Chain, find_chain, forward_replaced
from ..calibration.tokens import CalibrationTokens
from ..errors import ModelError
from ..evaluation.scores import log_probabilities, predict, score
from ..models.files import read_json
from ..models.layers import Layer, block_of
from ..models.load import LoadedModel
from ..models.weights import replaced
from ..pipeline.store import Store, StoredLayer
from ..support.files import write_json
from ..support.progress import counting
from .question import Question

logger = logging.getLogger("quailora")

DIVERGENCE_TOKENS = 1024
"""Held-out tokens that predictions are compared on, twice for each layer."""

Fronts = tuple[list[Tensor], list[Call]]
"""Hidden states in front of each block of a model, and what else the block was called with."""

ERRORS, STEP, ENERGY = "errors", "step", "energy"
"""What is kept of each layer beside its weight in the reference network: errors by choice, a change of the weight, and
the squared change of the outputs, total over outputs, mean over held-out tokens."""


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


@torch.inference_mode()
def measure_divergences(
    question: Question,
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "windows length"],
    store: Store,
) -> tuple[float, dict[str, float]]:
    """Return the divergence of the reference network, and that with a step in each layer, as a mean over both signs.

    Divergences are those of the predictions from full precision, as means over tokens, in nats.
    """
    # An error b of a layer adds to the errors a of all others. To the second order the divergence then grows from
    # |a|^2 to |a + b|^2, in some norm. The product of a and b is no cost of b but chance, and larger than |b|^2 where
    # other layers have most of the error. With b added and with b taken off it has opposite signs, and the mean of
    # both divergences is |a|^2 + |b|^2.
    stored = {name: store.load(name) for name in layers}
    reference = {name: weight_in(one) for name, one in stored.items()}
    found = Found(store.folder_for("divergences") / "found.json")
    network = Network.of(loaded.model, windows[:1])
    logger.info(
        "Measuring what errors cost: %d layers with %s, one at a time with a step towards %s and away from it.",
        len(layers),
        question.reference.title,
        question.probe.title,
    )
    device = next(loaded.model.parameters()).device
    keys = ["", *(f"{sign}{name}" for name in layers for sign in "+-")]  # the first one is the reference network itself
    with counting("Measuring divergences", len(windows) * len(keys), len(found.values)) as counter:
        for number, window in enumerate(windows):
            ids = window.to(device)
            if all(f"{number} {key}" in found.values for key in keys):
                continue
            expected = log_probabilities(predict(loaded.model, ids, 1))
            # One layer at a time is measured in a network that is quantized as a whole. Upstream of it, inputs are then
            # as far off as they will be in the end, and so is what downstream layers do with its errors.
            with replaced(layers, reference):
                fronts = network.fronts(ids)
                for members in in_blocks(keys):
                    measured: dict[str, float] = {}
                    for key in members:
                        if f"{number} {key}" not in found.values:
                            name = key[1:]
                            with replaced(layers, {name: stepped(stored[name], key)} if name else {}):
                                logits = network.logits(ids, fronts, name)
                            measured[f"{number} {key}"] = score(expected, logits, ids[1:])[1]
                            counter.advance()
                    found.add(measured)
    means = {key: sum(found.values[f"{n} {key}"] for n in range(len(windows))) / len(windows) for key in keys}
    return means[""], {name: (means[f"+{name}"] + means[f"-{name}"]) / 2 for name in layers}


def stepped(stored: StoredLayer, key: str) -> Tensor:
    """Return the weight of a layer with the step added or taken off, as the sign in front of its name says."""
    weight, step = weight_in(stored), stored.packed[STEP]
    return weight + step if key.startswith("+") else weight - step


def in_blocks(keys: Iterable[str]) -> Iterator[list[str]]:
    """Yield the layers of each block, by their names with a sign in front."""
    blocks: dict[str, list[str]] = {}
    for key in keys:
        blocks.setdefault(block_of(key[1:]), []).append(key)
    yield from blocks.values()


@final
@dataclass(frozen=True, eq=False)
class Network:
    """A model that can be run from any of its blocks on.

    Attributes:
        model: the model.
        chain: its blocks; None if it is no chain of blocks, and always run as a whole.
    """

    model: Any
    chain: Chain | None

    @classmethod
    def of(cls, model: Any, probe: Int[Tensor, "1 tokens"]) -> Network:
        """Find the blocks of a model, which is run on a few tokens for that."""
        try:
            return cls(model, find_chain(model, probe.to(next(model.parameters()).device)))
        except ModelError:
            return cls(model, None)

    def fronts(self, ids: Int[Tensor, " tokens"]) -> Fronts:
        """Run the blocks on a window, and return what each of them was called with."""
        if self.chain is None:
            return [], []
        hidden, calls = self.chain.record(ids[None])
        kept = [hidden]
        for index, call in enumerate(calls[:-1]):
            kept.append(self.chain.run(index, call, kept[-1]))
        return kept, calls

    def logits(self, ids: Int[Tensor, " tokens"], fronts: Fronts, layer: str) -> Float[Tensor, "predicted vocabulary"]:
        """Return the logits for all tokens of a window but the first, after the weight of one layer has changed.

        Args:
            ids: the window.
            fronts: what `fronts` returned for the window before the change.
            layer: name of the layer.
        """
        chain = self.chain
        blocks = [] if chain is None else [n for n, name in enumerate(chain.names) if layer.startswith(f"{name}.")]
        if chain is None or not blocks:
            return predict(self.model, ids, 1)
        # What comes before the block of the layer has not changed, so the model goes on from there.
        hidden = fronts[0][blocks[0]]
        for index in range(blocks[0], len(chain.blocks)):
            hidden = chain.run(index, fronts[1][index], hidden)
        reply = hidden if chain.rest is None else (hidden, *chain.rest)
        with forward_replaced(chain.blocks, [lambda *_, **__: reply] * len(chain.blocks)):
            return predict(self.model, ids, 1)


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
