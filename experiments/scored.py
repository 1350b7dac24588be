"""What experiments on models that were made in one run share: their jobs, and the scores of such a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from quailora.evaluation.scores import Corrected, measure
from quailora.evaluation.texts import EvaluationTexts
from quailora.pipeline.output import AdapterOutput
from quailora.pipeline.store import StoredLayer

from .after import acquired
from .data import OTHER_TEXTS, TEST


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


def open_jobs(
    names: Sequence[str], done: Callable[[], set[str]], folder: Path, only: str = "", seconds: float = 1e9
) -> Iterator[str]:
    """Yield the jobs that are left and that no other process is at, each while its lock is held.

    Args:
        names: all jobs, most important first.
        done: returns those that are done.
        folder: folder for the locks.
        only: jobs whose names contain this.
        seconds: after which no further job is begun.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for job in names:
        lock = FileLock(folder / f"{job.replace('/', '-')}.lock")
        if only not in job or job in done() or time.monotonic() - began > seconds or not acquired(lock):
            continue
        try:
            if job not in done():  # another process may have finished it just now
                yield job
        finally:
            lock.release()


def scores_of(
    finished: AdapterOutput, stages: Mapping[str, Mapping[str, StoredLayer]], texts: Path, size: Size
) -> dict[str, dict[str, list[float]]]:
    """Return losses and divergences of each window, by stage and text; those of full precision, too.

    Args:
        finished: a run.
        stages: the layers at some stages of it.
        texts: folder with WikiText-2 and C4.
        size: how much is measured.
    """
    model = finished.loaded.model
    variants: dict[str, Mapping[str, Any]] = {"full": {}}
    for stage, layers in stages.items():
        weights = {name: one.dequantized for name, one in layers.items() if one.dequantized is not None}
        corrections = {name: one.correction for name, one in layers.items() if one.correction is not None}
        variants[stage] = Corrected(weights, corrections, model.device)
    sources = tuple(str(texts / name) for name in (TEST, OTHER_TEXTS["c4"]))
    cut = EvaluationTexts(sources, windows=size.windows, window_length=size.window_length).cut(finished.loaded)
    scores: dict[str, dict[str, list[float]]] = {stage: {} for stage in variants}
    for (_, ids), text in zip(cut, ("wikitext2", "c4"), strict=True):
        for stage, found in measure(model, finished.run.layers, variants, ids, f"Evaluating on {text}").items():
            scores[stage] |= {text: list(found.losses), f"{text} kl": list(found.divergences)}
    return scores
