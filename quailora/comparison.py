"""Methods side by side: one calibration, one evaluation, one board."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from .adapters.lora import LoraScaling
from .calibration import Calibration, CalibrationDtype, TextSource, evaluation_windows, shipped_text
from .checkpoint import locked
from .contenders import Contender
from .contest import FULL_PRECISION, Contest
from .errors import ConfigurationError
from .fingerprint import digest, fingerprint
from .models.layers import linear_layers
from .models.load import DeviceName, DtypeName, LoadedModel, check_sequence_length, load_model
from .plan import check_scaling
from .quantizers import NF4, Int8, Quantizer, Uniform
from .recipes import RECIPES, find_recipe
from .report.comparison import Comparison, Row
from .report.record import versions_in_words
from .report.settings import as_command, describe
from .scoreboard import Scoreboard, write_comparison
from .tasks import Tasks

logger = logging.getLogger("quailora")

BASELINES: dict[str, Quantizer] = {
    "int8": Int8(),
    "6-bit": Uniform(bits=6),
    "5-bit": Uniform(bits=5),
    "4-bit": Uniform(bits=4),
    "3-bit": Uniform(bits=3),
}
"""Bases alone, with more bits and fewer, since an adapter has to beat spending its bytes on them."""


def compare(
    model: str,
    *,
    out: str,
    recipes: Sequence[str] = ("all",),
    ranks: Sequence[int] = (16,),
    quantizer: Quantizer = NF4(),  # noqa: B008 # frozen
    against: str = "quailora",
    baselines: Sequence[str] = tuple(BASELINES),
    text: Sequence[str] = (),
    text_fields: Sequence[str] = ("text",),
    windows: int = 10,
    window_length: int = 2048,
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    task_limit: int | None = None,
    calibration: str | None = None,
    calibration_fields: Sequence[str] = ("text",),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int = 1024,
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
    fresh: bool = False,
) -> Comparison:
    """Compare methods on the same calibration data: perplexity, divergence, bytes and seconds.

    Every finished row is kept, so a comparison that was interrupted goes on, and recipes, ranks and baselines that are
    named later join those in the folder.
    Writes results.json, results.csv, results.md and report.html. `quailora init --recipe` gives the adapter of a row.

    Args:
        model: hub name, folder, .gguf file, or "demo"; it is held in memory.
        out: folder for the results.
        recipes: names that `quailora list` shows, or "all".
        ranks: ranks of the adapters.
        quantizer: of the base.
        against: the recipe that differences are taken from, at the same rank.
        baselines: other bases to measure without an adapter: int8, and round to nearest in groups of 64 with 6, 5, 4
            or 3 bits. Gaps are closed towards int8.
        text: text or .jsonl files to evaluate on; the shipped text by default. Do not use the calibration text.
        text_fields: text fields of a .jsonl record.
        windows: windows of each text at most.
        window_length: tokens in such a window.
        tasks: also score every row on these tasks of lm-eval, which has to be installed.
        task_folder: folder with more tasks, as YAML files of lm-eval.
        task_limit: examples of each task at most.
        calibration: a text file, a .jsonl file, or the name of a data set; the shipped text by default.
        calibration_fields: text fields of a record, joined in this order.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, see `quailora init`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        fresh: forget earlier results in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    command = as_command(compare, dict(locals()))
    names = list(RECIPES) if "all" in recipes else [*recipes]
    rows = {name: find_recipe(name) for name in dict.fromkeys((against, *names))}
    contenders = [Contender.alone("base alone", quantizer), *map(baseline, baselines)]
    contenders += [Contender.of(name, row, quantizer, rank) for rank in ranks for name, row in rows.items()]
    calibrate_on = TextSource(calibration, tuple(calibration_fields), calibration_split)
    scored_on = Tasks(tuple(tasks), task_folder, task_limit)
    scored_on.check()
    source = Calibration(calibrate_on, samples, sequence_length, seed, calibration_dtype)

    loaded = load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    check_sequence_length(loaded.model, max(sequence_length, window_length))
    for rank in ranks:
        check_scaling(linear_layers(loaded.model), LoraScaling(rank))
    seen = source.windows(loaded.tokenizer)
    texts = dict(evaluation_texts(loaded, text, text_fields, windows, window_length))
    settings = {"quantizer": describe(quantizer), "seed": seed, "calibration dtype": calibration_dtype}
    settings |= {"tasks": list(tasks), "limit of tasks": task_limit} if tasks else {}
    settings |= {name: digest(ids) for name, ids in texts.items()}
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "work"):
        board = Scoreboard(folder / "rows", fingerprint(settings, loaded, seen), fresh)
        board.open()
        layers = linear_layers(loaded.model)
        Contest(loaded, layers, source, seen, texts, scored_on, folder / "work", board, seed).measure(contenders)
    comparison = Comparison(
        title=f"{model}, {quantizer!r}",
        reference=against,
        texts=tuple(texts),
        tasks=tuple(tasks),
        rows=tuple(standing(board.rows(), quantizer)),
        origin={"command": command, "date": datetime.now(UTC).date().isoformat(), "versions": versions_in_words()},
    )
    write_comparison(comparison, folder)
    return comparison


def standing(kept: Mapping[str, Row], quantizer: Quantizer) -> Iterator[Row]:
    """Yield full precision and every row that holds still, those of earlier comparisons in the folder among them."""
    possible = [Contender.alone("base alone", quantizer), *map(baseline, BASELINES)]
    found = {row.recipe for row in kept.values()}
    for rank in sorted({row.rank for row in kept.values() if row.recipe}):
        possible += [Contender.of(name, row, quantizer, rank) for name, row in RECIPES.items() if name in found]
    yield kept[FULL_PRECISION]
    for contender in possible:
        if contender.name in kept and kept[contender.name].method == contender.definition:
            yield kept[contender.name]


def baseline(name: str) -> Contender:
    """Return one of `BASELINES`.

    Raises:
        ConfigurationError: if there is none of this name.
    """
    if name not in BASELINES:
        raise ConfigurationError(f"Unknown baseline {name!r}. Expected some of {', '.join(BASELINES)}.")
    return Contender.alone(name, BASELINES[name])


def evaluation_texts(
    loaded: LoadedModel, paths: Sequence[str], fields: Sequence[str], windows: int, length: int
) -> Iterator[tuple[str, Int[Tensor, "windows length"]]]:
    """Yield the name and the windows of each text."""
    sources = {Path(path).stem: list(TextSource(path, tuple(fields)).documents()) for path in paths}
    for name, documents in (sources or {"shipped text": [shipped_text("evaluate")]}).items():
        ids = evaluation_windows(loaded.tokenizer, documents, windows, length)
        if len(ids) < windows:
            logger.warning("%s fills %d windows, not %d.", name, len(ids), windows)
        yield name, ids
