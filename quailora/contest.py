"""The rows of a comparison, measured in groups that share one walk through the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from .adapters.lora import LoraScaling
from .calibration import Calibration
from .checkpoint import open_checkpoint
from .fingerprint import digest
from .initializer import Initializer
from .layerwise import Method
from .measure import Corrected, Scores, measure
from .models.layers import Layer
from .models.load import LoadedModel
from .models.stream import InputsOf, Walk
from .quantizers import Quantizer
from .recipes import Recipe
from .report.comparison import Row
from .runs import Run
from .scoreboard import Scoreboard
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


def groups(contenders: Sequence[Contender]) -> Iterator[list[Contender]]:
    """Yield contenders that can share one walk: all on full-precision inputs, then each other alone."""
    together = [contender for contender in contenders if contender.inputs == "full"]
    if together:
        yield together
    for contender in contenders:
        if contender.inputs != "full":
            yield [contender]


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
            start = time.perf_counter()
            for contender in group:
                run.polish(contender.name, self.source, self.loaded.tokenizer)
            polishing = time.perf_counter() - start  # by the one contender that does, if any
            scores = self._scores(run, group)
            if FULL_PRECISION in scores:
                self.board.add(Row(FULL_PRECISION, scores[FULL_PRECISION]))
            own = sum(record.seconds for contender in group for record in run.records(contender.name))
            walking = sum(run.seconds.values()) - own
            for contender in group:
                row = Row.of(contender.name, run.records(contender.name), scores[contender.name])
                extra = walking + (polishing if contender.method.polish else 0.0)
                row = replace(row, seconds=round(row.seconds + extra, 2), method=contender.definition)
                if contender.recipe:
                    row = replace(
                        row,
                        recipe=contender.recipe,
                        rank=contender.method.scaling.rank,
                        changes_base=contender.changes_base,
                        spectrum=mean_spectrum(run, contender),
                    )
                self.board.add(row)
            run.checkpoint.remove()

    def _scores(self, run: Run, group: Sequence[Contender]) -> dict[str, dict[str, Scores]]:
        """Return the scores of each contender, and of full precision if it has no row yet, on each text."""
        variants: dict[str, Mapping[str, Tensor]] = {FULL_PRECISION: {}}
        if FULL_PRECISION in self.board.rows():
            variants = {}
        variants |= {contender.name: weights_of(run, contender, group) for contender in group}
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
        kept = [each.name for each in group if each.changes_base or each.method.polish or each is sharing(group)]
        run = Run(walk, self.layers, {each.name: each.method for each in group}, checkpoint, kept, self.seed)
        run.finish()
        return run


def sharing(group: Sequence[Contender]) -> Contender | None:
    """Return the contender whose quantized weights are those of all in its group that keep the base."""
    return next((contender for contender in group if not contender.changes_base), None)


def weights_of(run: Run, contender: Contender, group: Sequence[Contender]) -> Mapping[str, Tensor]:
    """Return what the layers of a contender compute with."""
    base = contender if contender.changes_base else sharing(group)
    quantized = {name: one.dequantized for name, one in run.outcomes(base.name if base else "").items()}
    corrections = {name: one.low_rank for name, one in run.outcomes(contender.name).items()}
    factors = {name: (low.lora_A, low.lora_B) for name, low in corrections.items() if low is not None}
    weights = {name: weight for name, weight in quantized.items() if weight is not None}
    return Corrected(weights, factors if contender.recipe else {})


def mean_spectrum(run: Run, contender: Contender) -> tuple[float, ...]:
    """Return the mean over layers of the share of the error that the first 1, 2, ... directions remove.

    Empty where the solver does not minimise the output error.
    """
    if contender.method.initializer.metric != "gram":
        return ()
    shares = [
        one.low_rank.energies.cumsum(0) / one.record.error_none
        for one in run.outcomes(contender.name).values()
        if one.low_rank and one.record and one.record.error_none > 0
    ]
    return tuple(torch.stack(shares).mean(0).tolist()) if shares else ()
