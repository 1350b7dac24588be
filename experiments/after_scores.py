"""The trained adapters of `experiments/after.py`, and the scores of weights of a model on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from quailora import NF4
from quailora.adapters.change import TrainedChange, family_of_saved
from quailora.adapters.saved import SavedAdapter
from quailora.bases import ExistingBase
from quailora.bases.fresh import FreshBase
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import load_model
from quailora.models.locate import resolve
from quailora.models.weights import replaced

from .arms import ARMS
from .data import Data, load_data
from .protocol import Protocol, Run
from .starts import start_place

STARTS = {"qlora": 3.2e-3, "quailora": 1.6e-3, "best": 1.6e-3}
"""Arms whose adapters are merged and moved, with the learning rate of each."""

_ROWS = 8  # sequences whose predictions are kept at a time

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter of the experiment.

    Attributes:
        arm: name of its arm.
        seed: seed of its training.
        bench: the folder of starts and adapters.
    """

    arm: str
    seed: int
    bench: Path

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.bench / "adapters" / Run(self.arm, 16, STARTS[self.arm], self.seed).key

    @property
    def initial(self) -> Path | str:
        """Where its start is; "zero" for plain LoRA."""
        place = start_place(ARMS[self.arm], 16, "train", self.bench / "starts")
        return "zero" if place is None else place


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores weights of a model on the held-out pairs and on WikiText-2, in float32.

    Attributes:
        name: hub name or folder of the full-precision model.
        model: the model.
        layers: its linear layers.
        data: the texts.
        device: where it is.
    """

    name: str
    model: Any
    layers: dict[str, Layer]
    data: Data
    device: str

    @classmethod
    def of(cls, protocol: Protocol, texts: Path, device: str) -> Scorer:
        """Load the model and the texts."""
        loaded = load_model(protocol.model, "float32", "cuda" if device == "cuda" else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(resolve(protocol.model))
        data = load_data(texts, tokenizer, protocol)
        return cls(protocol.model, loaded.model, linear_layers(loaded.model), data, device)

    def own(self) -> Weights:
        """Return the weights of the full-precision model."""
        return {name: layer.weight.clone() for name, layer in self.layers.items()}

    def of_base(self, base: ExistingBase) -> Weights:
        """Return the weights of a base."""
        return {name: base.weight_of(layer).dequantize() for name, layer in self.layers.items()}

    def unmerged(self, adapter: Adapter) -> Weights:
        """Return what the unmerged model computes with: NF4 with the trained adapter."""
        return self.on(FreshBase(self.name, NF4()), adapter.folder)

    def on(self, base: ExistingBase, folder: Path) -> Weights:
        """Return what an adapter makes of a base."""
        change = effect_of(folder)
        layers = change.layers(self.layers)
        return {
            name: change.effective(layer, layers, base.weight_of(layer).dequantize()).to(self.device)
            for name, layer in layers.items()
        }

    def full(self, adapter: Adapter) -> Weights:
        """Return the full-precision weights with what training has changed."""
        change = TrainedChange.read(adapter.folder, adapter.initial)
        layers = change.layers(self.layers)
        return {name: layer.weight + change.of(layer, layers).to(self.device) for name, layer in layers.items()}

    @torch.inference_mode()
    def scores(
        self, reference: Weights, variants: Mapping[str, Weights], own: str = ""
    ) -> dict[str, dict[str, list[float]]]:
        """Return losses of each variant, and divergences from the reference, pair by pair and window by window.

        Args:
            reference: weights of the reference.
            variants: weights of each variant.
            own: name under which the reference is among the results, if it is to be.
        """
        rows = [pair.ids for pair in self.data.held_out] + list(self.data.wikitext)
        names = [*variants, *filter(None, [own])]
        found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "kl": []} for name in names}
        for part in parts(rows):
            with replaced(self.layers, reference):
                expected = [self._predict(ids) for ids in part]
            for ids, log_p in zip(part, expected, strict=True) if own else ():
                loss = functional.nll_loss(log_p, ids[1:].to(self.device)).item()
                found[own]["loss"].append(round(loss, 5))
                found[own]["kl"].append(0.0)
            for name, weights in variants.items():
                with replaced(self.layers, weights):
                    for ids, log_p in zip(part, expected, strict=True):
                        log_q = self._predict(ids)
                        loss = functional.nll_loss(log_q, ids[1:].to(self.device)).item()
                        apart = functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item() / len(log_q)
                        found[name]["loss"].append(round(loss, 5))
                        found[name]["kl"].append(round(apart, 6))
        pairs = len(self.data.held_out)
        return {
            name: {
                "pairs": one["loss"][:pairs],
                "wikitext2": one["loss"][pairs:],
                "pairs kl": one["kl"][:pairs],
                "wikitext2 kl": one["kl"][pairs:],
            }
            for name, one in found.items()
        }

    def _predict(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)


def effect_of(folder: Path) -> TrainedChange:
    """Return an adapter whose effective weights are asked for, whatever it started from."""
    saved = SavedAdapter.read(folder)
    return TrainedChange(saved, None, *family_of_saved(saved))


def parts(rows: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield a few sequences at a time."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
