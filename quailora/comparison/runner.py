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
from ..calibration.walk import Walk
from ..calibration.windows import Calibration, given_tokens
from ..evaluation.scores import Corrected, Scores, measure
from ..evaluation.tasks import Tasks
from ..models.layers import Layer
from ..models.load import LoadedModel
from ..models.weights import replaced
from ..pipeline.checkpoint import open_checkpoint
from ..pipeline.fingerprint import digest
from ..pipeline.run import Run
from ..solvers.fisher import Sensitivity
from .store import Scoreboard
from .table import Row
from .variants import Contender, Entry, groups

logger = logging.getLogger("quailora")

FULL_PRECISION = "full precision"


@final
@dataclass(frozen=True, eq=False)
class Contest:
    """Measures contenders and writes their rows down.

    Attributes:
        loaded: the model, in memory.
        layers: its layers that are quantized.
        targets: those of them that are corrected.
        source: what is calibrated on.
        seen: its windows.
        texts: windows to evaluate on, by name of the text.
        tasks: to score on.
        work: folder for unfinished groups.
        board: gets the rows.
        seed: seed of untrained directions.
    """

    loaded: LoadedModel
    layers: Mapping[str, Layer]
    targets: Mapping[str, Layer]
    source: Calibration
    seen: Int[Tensor, "samples sequence_length"]
    texts: Mapping[str, Int[Tensor, "windows window_length"]]
    tasks: Tasks
    work: Path
    board: Scoreboard
    seed: int

    def measure(self, contenders: Sequence[Contender]) -> None:
        """Measure full precision and all contenders that have no row yet."""
        there = self.board.rows()
        if FULL_PRECISION not in there:
            itself: dict[str, Mapping[str, Tensor]] = {FULL_PRECISION: {}}
            scores, accuracies = self._scores(itself), self._accuracies(itself)
            self.board.add(Row(FULL_PRECISION, scores[FULL_PRECISION], tasks=accuracies[FULL_PRECISION]))
        missing = [each for each in contenders if each.name not in there or there[each.name].method != each.definition]
        for group in groups(missing):
            logger.info("Rows: %s.", ", ".join(contender.name for contender in group))
            run = self._run(group)
            training = {contender.name: self._train(run, contender) for contender in group}
            entries = [Entry(each, run.outcomes(each.walked, each.method.polish)) for each in group]
            variants = self._variants(entries)
            scores, accuracies = self._scores(variants), self._accuracies(variants)
            solving = {entry.contender.walked: entry.seconds for entry in entries}
            walking = max(0.0, sum(run.seconds.values()) - sum(solving.values()))  # of this process, if it went on
            for entry in entries:
                name, method = entry.contender.name, entry.contender.method
                seconds = entry.seconds + walking + training[name]
                if method.initializer.metric == "fisher":
                    seconds += self.sensitivities[1]
                self.board.add(entry.row(scores[name], accuracies[name], seconds))
            run.checkpoint.remove()

    @cached_property
    def sensitivities(self) -> tuple[Mapping[str, Sensitivity], float]:
        """The sensitivity of each layer, and the seconds that finding them took."""
        start = time.perf_counter()
        found = find_sensitivities(self.loaded.model, self.layers, self.seen, self.source.dtype)
        return found, time.perf_counter() - start

    def _train(self, run: Run, contender: Contender) -> float:
        """Train a contender that asks for it; return the seconds."""
        start = time.perf_counter()
        run.polish(contender.walked, contender.method.polish, self.source, self.loaded.tokenizer)
        return time.perf_counter() - start

    def _variants(self, entries: Sequence[Entry]) -> dict[str, Mapping[str, Tensor]]:
        """Return what the layers of each entry compute with."""
        bases = {entry.contender.base: entry.quantized for entry in entries if entry.quantized}
        device = self.loaded.model.device
        return {each.contender.name: Corrected(bases[each.contender.base], each.factors, device) for each in entries}

    def _accuracies(self, variants: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
        """Return the score of each variant on each task."""
        found: dict[str, dict[str, float]] = {}
        for name, weights in variants.items():
            with replaced(self.layers, weights if self.tasks.names else {}):
                found[name] = self.tasks.scores(self.loaded.model, self.loaded.tokenizer)
            if self.tasks.names:
                logger.info("%s: %s.", name, ", ".join(f"{task} {score:.3f}" for task, score in found[name].items()))
        return found

    def _scores(self, variants: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Scores]]:
        """Return the scores of each variant on each text."""
        scores: dict[str, dict[str, Scores]] = {name: {} for name in variants}
        given = given_tokens(self.loaded.tokenizer, self.source.bos)
        for text, ids in self.texts.items():
            found = measure(self.loaded.model, self.layers, variants, ids, f"Evaluating on {text}", given)
            for name, score in found.items():
                scores[name][text] = score
        return scores

    def _run(self, group: Sequence[Contender]) -> Run:
        place = self.work / digest([contender.definition for contender in group])
        place.mkdir(exist_ok=True)
        checkpoint = open_checkpoint(place, self.board.fingerprint, fresh=False)
        walk = Walk(
            self.loaded.model,
            self.layers,
            self.seen,
            inputs=group[0].inputs,
            dtype=self.source.dtype,
            activations=checkpoint.activations,
            start=checkpoint.blocks_done,
            on_done=checkpoint.set_blocks_done,
        )
        methods = {each.walked: replace(each.method, polish=None) for each in group}
        kept = {each.base: each.walked for each in group}.values()
        trained = [each.walked for each in group if each.method.polish]
        weighted = any(each.method.initializer.metric == "fisher" for each in group)
        sensitivities = self.sensitivities[0] if weighted else {}
        run = Run(
            walk, self.targets, methods, checkpoint, {*kept, *trained}, seed=self.seed, sensitivities=sensitivities
        )
        run.finish()
        return run
