"""What experiments on models that were made in one run share: sizes, and the scores of such a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quailora.evaluation.scores import Corrected, measure
from quailora.evaluation.texts import EvaluationTexts
from quailora.methods.recipes import Recipe
from quailora.models.layers import Layer
from quailora.models.load import LoadedModel
from quailora.pipeline.formats import example_by
from quailora.pipeline.store import StoredLayer, corrections_of, weights_of
from quailora.quantizers import Quantizer
from quailora.schedules import HeldOut, Once
from quailora.solvers import Zero

from .data import OTHER_TEXTS, TEST

BARE = Recipe("no adapter, rounded as held-out tokens choose", Zero(), schedule=HeldOut(Once()), inputs="asymmetric")
"""What makes a base without an adapter, as carefully as `best-joint` makes one with an adapter."""


@dataclass(frozen=True)
class Size:
    """How much a job calibrates on, and how much it is measured on.

    Attributes:
        samples: calibration windows, of which three quarters are fitted to.
        sequence_length: tokens in each of them.
        windows: evaluation windows of each text.
        window_length: tokens in each of these.
    """

    samples: int = 160
    sequence_length: int = 1024
    windows: int = 8
    window_length: int = 2048


def bytes_of(quantizer: Quantizer, shapes: Iterable[tuple[int, int]]) -> float:
    """Return the bytes of layers of some shapes, (out_features, in_features), without an adapter."""
    return sum(example_by(quantizer, shape).bits_per_weight * shape[0] * shape[1] / 8 for shape in shapes)


def scores_of(
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    stages: Mapping[str, Mapping[str, StoredLayer]],
    texts: Path,
    size: Size,
) -> dict[str, dict[str, list[float]]]:
    """Return losses and divergences of each window, by stage and text; those of full precision, too.

    Args:
        loaded: the model in full precision.
        layers: its layers that are quantized.
        stages: what has become of these at some stages of a run.
        texts: folder with WikiText-2 and C4.
        size: how much is measured.

    Raises:
        ValueError: if a run has not kept the weights of its layers, which would be measured in full precision.
    """
    model = loaded.model
    variants: dict[str, Mapping[str, Any]] = {"full": {}}
    for stage, made in stages.items():
        weights = weights_of(made)
        if len(weights) < len(layers):
            raise ValueError(f"Expected the weights of {len(layers)} layers, got {len(weights)}. Keep them in the run.")
        variants[stage] = Corrected(weights, corrections_of(made), model.device)
    sources = tuple(str(texts / name) for name in (TEST, OTHER_TEXTS["c4"]))
    cut = EvaluationTexts(sources, windows=size.windows, window_length=size.window_length).cut(loaded)
    scores: dict[str, dict[str, list[float]]] = {stage: {} for stage in variants}
    for (_, ids), text in zip(cut, ("wikitext2", "c4"), strict=True):
        for stage, found in measure(model, layers, variants, ids, f"Evaluating on {text}").items():
            scores[stage] |= {text: list(found.losses), f"{text} kl": list(found.divergences)}
    return scores
