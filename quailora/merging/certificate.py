"""How far a merged model is from the model that was trained: its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ..calibration.windows import given_tokens
from ..errors import QualityError
from ..evaluation.evaluate import loaded_in_memory
from ..evaluation.scores import Difference, Scores, measure
from ..evaluation.texts import EvaluationTexts
from ..models.layers import all_layers
from ..models.weights import replaced
from ..pipeline.fine_tuned import Computed, FineTuned, modules_of
from ..pipeline.options import Resources
from ..quantizers import Quantizer
from ..support.tables import markdown_table, print_table

MERGED = "this model"
ROUNDED = "the trained weights rounded, as merge_and_unload does"
FULL = "merged in full precision"
FULL_ROUNDED = "merged in full precision, then rounded"


@final
@dataclass(frozen=True)
class Certificate:
    """Divergence of a merged model, and of what people do otherwise, from the trained model with its adapter.

    Attributes:
        texts: by the name of each text, by the name of each variant: its scores, see `Scores`. Divergences are
            `KL(p || q)` in nats a token, with `p` of the unmerged model.
        unmerged: by the name of each text, the mean loss of the unmerged model on each window, nats a token.
        window_length: tokens in a window.
    """

    texts: Mapping[str, Mapping[str, Scores]]
    unmerged: Mapping[str, tuple[float, ...]]
    window_length: int

    @property
    def divergence(self) -> float:
        """The largest mean divergence of the merged model on a text, nats a token."""
        return max(scores[MERGED].divergence for scores in self.texts.values())

    def check(self, limit: float | None) -> None:
        """Raise a `QualityError` if the merged model is further from the unmerged one than was asked for."""
        if limit is not None and not self.divergence <= limit:
            text, scores = max(self.texts.items(), key=lambda item: item[1][MERGED].divergence)
            raise QualityError(
                f"Expected a divergence from the unmerged model of at most {limit:g} nats a token, got "
                f"{scores[MERGED].divergence:.4f} on {text}, so nothing was written. Calibrate on more text of the "
                "task, take more bits, keep the adapter beside its base, or raise `max_kl`."
            )

    def rows(self, text: str) -> list[list[str]]:
        """Return a table of a text: variant, divergence, and loss less that of the unmerged model, with intervals."""
        scores = self.texts[text]
        unmerged = Scores(self.unmerged[text], (0.0,) * len(self.unmerged[text]))
        rows = [["unmerged", "0", f"{sum(unmerged.losses) / len(unmerged.losses):.4f}", ""]]
        for name, one in scores.items():
            apart = Difference.between(one, unmerged) if len(one.losses) > 1 else None
            loss = sum(one.losses) / len(one.losses)
            shown = "" if apart is None else f"{apart.mean:+.4f} ({apart.low:+.4f} to {apart.high:+.4f})"
            rows.append([name, f"{one.divergence:.4f}", f"{loss:.4f}", shown])
        return rows

    def show(self) -> None:
        """Print a table for each text."""
        for text in self.texts:
            windows = len(self.unmerged[text])
            print_table(f"{text}: {windows} windows of {self.window_length} tokens", HEAD, self.rows(text))

    def as_markdown(self) -> str:
        """Return the tables for a card."""
        return "\n\n".join(f"On {text}:\n\n{markdown_table(HEAD, self.rows(text))}" for text in self.texts)

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON."""
        return asdict(self)


HEAD = ("weights", "KL from the unmerged model", "loss", "loss less that of the unmerged model, 95 %")


@torch.inference_mode()
def certify(
    fine_tuned: FineTuned,
    model: str,
    merged: Mapping[str, Tensor],
    nearest: Quantizer,
    texts: EvaluationTexts,
    resources: Resources,
) -> Certificate:
    """Measure a merged model and what people do otherwise against the unmerged one.

    Args:
        fine_tuned: what was merged; its base that was trained on has to be known.
        model: hub name or folder of the full-precision model, which is loaded into memory.
        merged: weights of the merged model, (out_features, in_features), by the names of its layers.
        nearest: rounds to the nearest levels of the same format.
        texts: what to measure on.
        resources: what of the machine to use.
    """
    loaded = loaded_in_memory(model, resources)
    layers = all_layers(loaded.model)
    (change,) = fine_tuned.changes
    own = change.layers(layers)
    trained = replace(fine_tuned, target="trained")
    every = trained.among(layers, [own]) | {name: layers[name] for name in merged if name in layers}
    modules = modules_of(loaded.model, change)
    unmerged = Computed(every, lambda layer: trained.weight(layer, [own]))
    full = {name: replace(fine_tuned, target="full").weight(layer, [own]) for name, layer in every.items()}
    found: dict[str, Mapping[str, Scores]] = {}
    losses: dict[str, tuple[float, ...]] = {}
    given = given_tokens(loaded.tokenizer, texts.bos)
    length = 0
    # The unmerged model stands in the place of the model itself, which `measure` compares variants with. Weights that
    # are rounded are read from the layers, which hold those of the unmerged model by then.
    with replaced(every, unmerged), replaced(modules, change.modules):
        variants: dict[str, Mapping[str, Tensor]] = {
            MERGED: merged,
            ROUNDED: Computed(every, lambda layer: nearest.quantize(layer.weight).dequantize()),
            FULL: full,
            FULL_ROUNDED: Computed(every, lambda layer: nearest.quantize(full[layer.name]).dequantize()),
            "unmerged": {},
        }
        for text, ids in texts.cut(loaded):
            scores = measure(loaded.model, every, variants, ids, f"Measuring on {text}", given)
            losses[text] = scores.pop("unmerged").losses
            found[text], length = scores, ids.shape[1]
    return Certificate(found, losses, length)
