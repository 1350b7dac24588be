"""The rows of a comparison, measured in groups that share one walk through the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

from jaxtyping import Int
from torch import Tensor

from ..calibration.gradients import find_sensitivities
from ..calibration.sources import TextCalibration
from ..calibration.tokens import CalibrationTokens
from ..calibration.walk import Walk
from ..calibration.windows import given_tokens
from ..core.weightings import Sensitivity
from ..evaluation.scores import Corrected, Scores, biases_of, measure
from ..evaluation.tasks import Tasks
from ..models.layers import Layer
from ..models.load import LoadedModel
from ..models.weights import biased, replaced
from ..pipeline.checkpoint import open_checkpoint
from ..pipeline.fingerprint import digest
from ..pipeline.run import ModelRun
from .store import RowStore
from .table import Row
from .variants import Variant, VariantResult, groups

logger = logging.getLogger("quailora")

FULL_PRECISION = "full precision"


@final
@dataclass(frozen=True, eq=False)
class ComparisonRunner:
    """Measures variants of a model and keeps their rows.

    Attributes:
        loaded: the model, in memory.
        layers: its layers that are quantized.
        targets: those of these layers that get a correction.
        source: the calibration text and how it is cut.
        seen: calibration windows.
        texts: windows to evaluate on, by name of the text.
        tasks: tasks of lm-eval to score each variant on.
        work: folder for groups of variants that are not finished.
        store: keeps finished rows.
        seed: seed of untrained directions.
    """

    loaded: LoadedModel
    layers: Mapping[str, Layer]
    targets: Mapping[str, Layer]
    source: TextCalibration
    seen: CalibrationTokens
    texts: Mapping[str, Int[Tensor, "windows window_length"]]
    tasks: Tasks
    work: Path
    store: RowStore
    seed: int

    def measure(self, variants: Sequence[Variant]) -> None:
        """Measure full precision and all variants that have no row yet."""
        finished = self.store.rows()
        if FULL_PRECISION not in finished:
            unchanged: dict[str, Mapping[str, Tensor]] = {FULL_PRECISION: {}}
            scores, accuracies = self._scores(unchanged), self._accuracies(unchanged)
            self.store.add(Row(FULL_PRECISION, scores[FULL_PRECISION], tasks=accuracies[FULL_PRECISION]))
        missing = [
            variant
            for variant in variants
            if variant.name not in finished or finished[variant.name].method != variant.definition
        ]
        for group in groups(missing):
            logger.info("Rows: %s.", ", ".join(variant.name for variant in group))
            run = self._run(group)
            training = {variant.name: self._train(run, variant) for variant in group}
            # All variants of a group are evaluated on the same windows one after the other, so that predictions of full
            # precision are made once for all of them.
            results = [
                VariantResult(variant, run.finished(variant.run_key, variant.method.distillation)) for variant in group
            ]
            weights = self._weights(results)
            scores, accuracies = self._scores(weights), self._accuracies(weights)
            solving = {result.variant.run_key: result.seconds for result in results}
            # Only this process's seconds are known: a run that was interrupted has walked before, too.
            walking = max(0.0, sum(run.seconds.values()) - sum(solving.values()))
            for result in results:
                name, method = result.variant.name, result.variant.method
                seconds = result.seconds + walking + training[name]
                if method.initializer.weighting.needs_gradients:
                    seconds += self.sensitivities[1]
                self.store.add(result.row(scores[name], accuracies[name], seconds))
            run.store.remove()

    @cached_property
    def sensitivities(self) -> tuple[Mapping[str, Sensitivity], float]:
        """The sensitivity of each layer, and the seconds that finding them took."""
        start = time.perf_counter()
        sensitivities = find_sensitivities(self.loaded.model, self.layers, self.seen, self.source.dtype)
        return sensitivities, time.perf_counter() - start

    def _train(self, run: ModelRun, variant: Variant) -> float:
        """Distil a variant whose method asks for it; return how many seconds that took."""
        start = time.perf_counter()
        run.distil(variant.run_key, variant.method.distillation, self.source, self.loaded.tokenizer)
        return time.perf_counter() - start

    def _weights(self, results: Sequence[VariantResult]) -> dict[str, Mapping[str, Tensor]]:
        """Return the weights that the layers of each variant compute with, by name of the variant."""
        bases = {result.variant.base_key: result.quantized for result in results if result.quantized}
        device = self.loaded.model.device
        return {
            result.variant.name: Corrected(bases[result.variant.base_key], result.corrections, device)
            for result in results
        }

    def _accuracies(self, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
        """Return the score of each variant on each task."""
        accuracies: dict[str, dict[str, float]] = {}
        for name, layer_weights in weights.items():
            scored = layer_weights if self.tasks.names else {}
            with replaced(self.layers, scored), biased(self.layers, biases_of(scored)):
                accuracies[name] = self.tasks.scores(self.loaded.model, self.loaded.tokenizer)
            if self.tasks.names:
                logger.info(
                    "%s: %s.", name, ", ".join(f"{task} {score:.3f}" for task, score in accuracies[name].items())
                )
        return accuracies

    def _scores(self, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Scores]]:
        """Return the scores of each variant on each text."""
        scores: dict[str, dict[str, Scores]] = {name: {} for name in weights}
        given = given_tokens(self.loaded.tokenizer, self.source.calibration.bos)
        for text, ids in self.texts.items():
            of_text = measure(self.loaded.model, self.layers, weights, ids, f"Evaluating on {text}", given)
            for name, score in of_text.items():
                scores[name][text] = score
        return scores

    def _run(self, group: Sequence[Variant]) -> ModelRun:
        folder = self.work / digest([variant.definition for variant in group])
        folder.mkdir(exist_ok=True)
        checkpoint = open_checkpoint(folder, self.store.fingerprint, fresh=False)
        walk = Walk(
            self.loaded.model,
            self.layers,
            self.seen,
            inputs=group[0].method.inputs,
            dtype=self.source.dtype,
            activations=checkpoint.activations,
            start=checkpoint.blocks_done,
            on_done=checkpoint.set_blocks_done,
            batch_tokens=group[0].method.batch_tokens,
        )
        methods = {variant.run_key: replace(variant.method, distillation=None) for variant in group}
        # Weights of a base are kept once for all variants on it, by whichever of them comes last; distillation needs
        # those of its own variant as well.
        keepers = {variant.base_key: variant.run_key for variant in group}.values()
        distilled = [variant.run_key for variant in group if variant.method.distillation]
        weighted = any(variant.method.initializer.weighting.needs_gradients for variant in group)
        sensitivities = self.sensitivities[0] if weighted else {}
        run = ModelRun(
            walk, self.targets, methods, checkpoint, {*keepers, *distilled}, seed=self.seed, sensitivities=sensitivities
        )
        run.finish()
        return run
