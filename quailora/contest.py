"""The rows of a comparison, measured in groups that share one walk through the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from .adapters.lora import LoraScaling
from .calibration import Calibration
from .checkpoint import Outcome, open_checkpoint
from .fingerprint import digest
from .initializer import Initializer
from .layerwise import Method
from .measure import Corrected, Scores, measure
from .models.gradients import find_sensitivities
from .models.layers import Layer
from .models.load import LoadedModel
from .models.stream import InputsOf, Walk
from .quantizers import Quantizer
from .recipes import Recipe
from .report.comparison import Row
from .runs import Run
from .scoreboard import Scoreboard
from .sensitivity import Sensitivity
from .solvers import Zero

logger = logging.getLogger("quailora")

FULL_PRECISION = "full precision"


@final
@dataclass(frozen=True)
class Contender:
    """One row to be measured.

    Attributes:
        name: of the row.
        method: how layers are initialized.
        recipe: name of the recipe; empty for a base alone.
        inputs: see `Walk`.
        changes_base: whether it needs weights of its own.
    """

    name: str
    method: Method
    recipe: str = ""
    inputs: InputsOf = "full"
    changes_base: bool = True

    @classmethod
    def of(cls, name: str, row: Recipe, quantizer: Quantizer, rank: int) -> Contender:
        """Return a recipe at a rank."""
        method = row.method(quantizer, LoraScaling(rank))
        return cls(f"{name} r{rank}", method, name, row.inputs, row.changes_base)

    @classmethod
    def alone(cls, name: str, quantizer: Quantizer) -> Contender:
        """Return a base without an adapter."""
        return cls(name, Method(Initializer(quantizer, Zero(), 1, "identity"), LoraScaling(1)))

    @property
    def definition(self) -> str:
        """Everything that the row depends on beside model and data."""
        return f"{self.method} on {self.inputs} inputs"

    @property
    def walked(self) -> str:
        """Names what it is after the walk through the model, before any training."""
        return digest([replace(self, method=replace(self.method, polish=None)).definition])


def groups(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Return contenders in groups that can share one walk.

    All on full-precision inputs can; on other inputs those that are the same but for a training that follows.
    """
    found: dict[str, list[Contender]] = {}
    for contender in contenders:
        found.setdefault("full" if contender.inputs == "full" else contender.walked, []).append(contender)
    return list(found.values())


@final
@dataclass(frozen=True, eq=False)
class Contest:
    """Measures contenders and writes their rows down.

    Attributes:
        loaded: the model, in memory.
        layers: its linear layers.
        source: what is calibrated on.
        seen: its windows.
        texts: windows to evaluate on, by name of the text.
        work: folder for unfinished groups.
        board: gets the rows.
        seed: seed of untrained directions.
    """

    loaded: LoadedModel
    layers: Mapping[str, Layer]
    source: Calibration
    seen: Int[Tensor, "samples sequence_length"]
    texts: Mapping[str, Int[Tensor, "windows window_length"]]
    work: Path
    board: Scoreboard
    seed: int

    def measure(self, contenders: Sequence[Contender]) -> None:
        """Measure all contenders that have no row yet."""
        there = self.board.rows()
        missing = [each for each in contenders if each.name not in there or there[each.name].method != each.definition]
        for group in groups(missing):
            logger.info("Rows: %s.", ", ".join(contender.name for contender in group))
            run = self._run(group)
            training = {contender.name: self._train(run, contender) for contender in group}
            entries = [Entry(each, run.outcomes(each.walked, each.method.polish)) for each in group]
            scores = self._scores(entries)
            if FULL_PRECISION in scores:
                self.board.add(Row(FULL_PRECISION, scores[FULL_PRECISION]))
            solving = {entry.contender.walked: entry.seconds for entry in entries}
            walking = sum(run.seconds.values()) - sum(solving.values())
            for entry in entries:
                name, method = entry.contender.name, entry.contender.method
                seconds = entry.seconds + walking + training[name]
                if method.initializer.metric == "fisher":
                    seconds += self.sensitivities[1]
                self.board.add(entry.row(scores[name], seconds))
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

    def _scores(self, entries: Sequence[Entry]) -> dict[str, dict[str, Scores]]:
        """Return the scores of each entry, and of full precision if it has no row yet, on each text."""
        shared = next((entry for entry in entries if not entry.contender.changes_base), None)
        variants: dict[str, Mapping[str, Tensor]] = {FULL_PRECISION: {}}
        if FULL_PRECISION in self.board.rows():
            variants = {}
        for entry in entries:
            own = entry if entry.contender.changes_base or shared is None else shared
            variants[entry.contender.name] = Corrected(own.quantized, entry.factors)
        scores: dict[str, dict[str, Scores]] = {name: {} for name in variants}
        for text, ids in self.texts.items():
            found = measure(self.loaded.model, self.layers, variants, ids, f"Evaluating on {text}")
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
        shared = [each.walked for each in group if not each.changes_base][:1]
        kept = [*shared, *(each.walked for each in group if each.changes_base or each.method.polish)]
        weighted = any(each.method.initializer.metric == "fisher" for each in group)
        sensitivities = self.sensitivities[0] if weighted else {}
        run = Run(walk, self.layers, methods, checkpoint, kept, self.seed, sensitivities)
        run.finish()
        return run


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """A contender after its run.

    Attributes:
        contender: which.
        outcomes: what became of each layer; tensors are memory-mapped.
    """

    contender: Contender
    outcomes: Mapping[str, Outcome]

    @property
    def quantized(self) -> dict[str, Tensor]:
        """`Q` of each layer, where it was kept."""
        return {name: one.dequantized for name, one in self.outcomes.items() if one.dequantized is not None}

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`(lora_A, lora_B)` of each layer; none for a base alone."""
        found = {name: one.low_rank for name, one in self.outcomes.items() if one.low_rank is not None}
        return {name: (low.lora_A, low.lora_B) for name, low in found.items()} if self.contender.recipe else {}

    @property
    def seconds(self) -> float:
        """What quantizing and correcting all layers took."""
        return sum(one.record.seconds for one in self.outcomes.values() if one.record)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Mean over layers of the share of the error that the first 1, 2, ... directions remove.

        Empty where the solver does not minimise the output error, and for a base alone.
        """
        if self.contender.method.initializer.metric != "gram" or not self.contender.recipe:
            return ()
        shares = [
            one.low_rank.energies.cumsum(0) / one.record.error_none
            for one in self.outcomes.values()
            if one.low_rank and one.record and one.record.error_none > 0
        ]
        return tuple(torch.stack(shares).mean(0).tolist()) if shares else ()

    def row(self, scores: Mapping[str, Scores], seconds: float) -> Row:
        """Return the row of these scores, which took so long."""
        contender = self.contender
        return Row(
            contender.name,
            scores,
            recipe=contender.recipe,
            rank=contender.method.scaling.rank if contender.recipe else 0,
            changes_base=bool(contender.recipe) and contender.changes_base,
            seconds=round(seconds, 2),
            layers=[one.record for one in self.outcomes.values() if one.record],
            spectrum=self.spectrum,
            method=contender.definition,
        )
