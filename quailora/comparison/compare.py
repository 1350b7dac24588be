"""Methods side by side, on the same calibration and the same evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..adapters.lora import LoraScaling
from ..calibration.sources import TextCalibration
from ..calibration.text import TextSource
from ..calibration.tokens import CalibrationTokens
from ..calibration.windows import (
    DEFAULT_LENGTH,
    BosPlacement,
    Calibration,
    CalibrationDtype,
    evaluation_source,
    evaluation_windows,
)
from ..errors import ConfigurationError
from ..evaluation.evaluate import EVALUATION_LENGTH
from ..evaluation.tasks import Tasks
from ..methods.recipes import RECIPES, find_recipe, resolved_name
from ..models.layers import ALL_LINEAR, Layer, linear_layers
from ..models.limits import check_token_ids, fitting_length
from ..models.load import DeviceName, DtypeName, LoadedModel, empty_model, load_model, resolve_device
from ..pipeline.checkpoint import locked
from ..pipeline.checks import check_scaling, check_seed, check_tokens
from ..pipeline.fingerprint import digest, fingerprint
from ..pipeline.report import versions_in_words
from ..pipeline.targets import in_short, plan_adapter
from ..quantizers import NF4, Int8, Quantizer, Uniform
from ..support.files import check_writable, folder_of
from ..support.machine import within_memory
from ..support.settings import as_command, describe
from .runner import FULL_PRECISION, ComparisonRunner
from .store import RowStore, write_comparison
from .table import Comparison, Row
from .variants import Variant

logger = logging.getLogger("quailora")

BASELINES: dict[str, Quantizer] = {
    "int8": Int8(),
    "6-bit": Uniform(bits=6),
    "5-bit": Uniform(bits=5),
    "4-bit": Uniform(bits=4),
    "3-bit": Uniform(bits=3),
}
"""Bases alone, with more bits and fewer, since an adapter has to beat spending its bytes on them."""


@within_memory("shorter windows (`window_length`, `sequence_length`), or `device='cpu'`")
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
    text_fields: Sequence[str] = (),
    windows: int = 10,
    window_length: int | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    task_limit: int | None = None,
    calibration: str | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
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
    Writes results.json, results.csv, results.md and report.html. `init` with the recipe of a row makes its adapter.

    Args:
        model: hub name, folder, .gguf file, or "demo"; it is held in memory.
        out: folder for the results.
        recipes: names that `quailora list` shows, or "all".
        ranks: ranks of the adapters.
        quantizer: the quantizer of the base.
        against: the recipe that differences are taken from, at the same rank.
        baselines: other bases to measure without an adapter: int8, and round to nearest in groups of 64 with 6, 5, 4
            or 3 bits. Gaps are closed towards int8.
        text: files, folders or data sets to evaluate on, likewise; the shipped text by default. Do not use the
            calibration text.
        text_fields: fields of a record that are the text, likewise.
        windows: windows of each text at most.
        window_length: tokens in such a window; 2048 by default, or all positions that the model has.
        tasks: also score every row on these tasks of lm-eval, which has to be installed.
        task_folder: folder with more tasks, as YAML files of lm-eval.
        task_limit: examples of each task at most.
        calibration: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the
            hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, see `init`.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each window, of calibration and of evaluation, with the tokens that the tokenizer
            puts in front of a text, such as BOS; "stream" only the first, as in the GPTQ papers. Without meaning for
            tokenizers that add none.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, see `init`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        fresh: forget earlier results in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    command = as_command(compare, dict(locals()))
    names = list(RECIPES) if "all" in recipes else [resolved_name(name) for name in recipes]
    against = resolved_name(against)
    chosen = {name: find_recipe(name) for name in dict.fromkeys((against, *names))}
    variants = [Variant.alone("base alone", quantizer), *map(baseline, baselines)]
    variants += [Variant.of(name, recipe, quantizer, rank) for rank in ranks for name, recipe in chosen.items()]
    calibrate_on = TextSource(calibration, tuple(calibration_fields), calibration_split)
    scored_on = Tasks(tuple(tasks), task_folder, task_limit)
    scored_on.check()
    evaluate_on = evaluation_sources(text, text_fields)
    for text_source in (calibrate_on, *evaluate_on.values()):
        text_source.check()
    folder = folder_of(out)
    check_writable(folder)
    for variant in variants:
        variant.method.check()
    check_seed(seed)
    resolve_device(device)

    # Everything above is checked before the model is loaded. The windows are drawn before any row is measured, since
    # rows of other windows cannot be compared: they are part of what the rows in the folder depend on.
    loaded = load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    length = fitting_length(loaded.model, sequence_length, DEFAULT_LENGTH)
    source = TextCalibration(Calibration(calibrate_on, samples, length, seed, calibration_dtype, bos))
    window_length = fitting_length(loaded.model, window_length, EVALUATION_LENGTH)
    layers, targets = compared_layers(loaded.model, model, ranks, trust_remote_code=trust_remote_code)
    check_tokens(layers, source)
    seen = CalibrationTokens.of_windows(check_token_ids(loaded.model, source.calibration.windows(loaded.tokenizer)))
    texts = dict(evaluation_texts(loaded, evaluate_on, windows, window_length, bos))
    settings = {"quantizer": describe(quantizer), "seed": seed, "calibration dtype": calibration_dtype}
    settings |= {"tasks": list(tasks), "limit of tasks": task_limit} if tasks else {}
    settings |= {f"text {name}": digest(ids) for name, ids in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "work"):
        store = RowStore(folder / "rows", fingerprint(settings, loaded, seen), fresh)
        store.open()
        ComparisonRunner(loaded, layers, targets, source, seen, texts, scored_on, folder / "work", store, seed).measure(
            variants
        )
    comparison = Comparison(
        title=f"{model}, {quantizer!r}",
        reference=against,
        texts=tuple(texts),
        tasks=tuple(tasks),
        rows=tuple(current_rows(store.rows(), quantizer)),
        origin={"command": command, "date": datetime.now(UTC).date().isoformat(), "versions": versions_in_words()},
    )
    write_comparison(comparison, folder)
    return comparison


def compared_layers(
    loaded: Any, model: str, ranks: Sequence[int], *, trust_remote_code: bool
) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """Return the layers that are quantized, and those of them that get corrections of every rank.

    Raises:
        TargetError: if no layer can get one.
    """
    plan = plan_adapter(empty_model(model, trust_remote_code=trust_remote_code), [ALL_LINEAR], LoraScaling(1))
    layers = plan.reach.watched(linear_layers(loaded))
    targets = {name: layer for name, layer in plan.of(layers).items() if min(layer.shape) >= max(ranks)}
    if not targets:
        check_scaling(plan.of(layers), LoraScaling(max(ranks)))
    small = [name for name in plan.of(layers) if name not in targets]
    if small:
        logger.warning("No corrections for layers smaller than rank %d: %s.", max(ranks), in_short(small))
    return layers, targets


def current_rows(stored: Mapping[str, Row], quantizer: Quantizer) -> Iterator[Row]:
    """Yield the full-precision row, then every stored row whose method is defined as it is today.

    Rows of earlier comparisons in the same folder are among them.

    Args:
        stored: stored rows by name.
        quantizer: quantizer of the base that recipes work on.
    """
    possible = [Variant.alone("base alone", quantizer), *map(baseline, BASELINES)]
    recipes = {row.recipe for row in stored.values()}
    for rank in sorted({row.rank for row in stored.values() if row.recipe}):
        possible += [Variant.of(name, recipe, quantizer, rank) for name, recipe in RECIPES.items() if name in recipes]
    yield stored[FULL_PRECISION]
    for variant in possible:
        if variant.name in stored and stored[variant.name].method == variant.definition:
            yield stored[variant.name]


def baseline(name: str) -> Variant:
    """Return the variant of one of `BASELINES`.

    Raises:
        ConfigurationError: if there is none of this name.
    """
    if name not in BASELINES:
        raise ConfigurationError(f"Unknown baseline {name!r}. Expected some of {', '.join(BASELINES)}.")
    return Variant.alone(name, BASELINES[name])


def evaluation_texts(
    loaded: LoadedModel,
    sources: Mapping[str, TextSource],
    windows: int,
    length: int,
    bos: BosPlacement = "every-window",
) -> Iterator[tuple[str, Int[Tensor, "windows length"]]]:
    """Yield the name and the windows of each text."""
    for name, source in sources.items():
        documents = source.documents(loaded.tokenizer)
        ids = check_token_ids(loaded.model, evaluation_windows(loaded.tokenizer, documents, windows, length, bos))
        if len(ids) < windows:
            logger.warning("%s fills %d windows, not %d.", name, len(ids), windows)
        yield name, ids


def evaluation_sources(paths: Sequence[str], fields: Sequence[str] = ()) -> dict[str, TextSource]:
    """Return the texts to evaluate on by name; the shipped one if there are none."""
    if not paths:
        return {"shipped text": evaluation_source(None, fields)}
    return {name: evaluation_source(path, fields) for name, path in distinct_names(paths).items()}


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Return paths by short names: those of the files, with as many folders as tell all of them apart.

    A path that is there twice gets one name.
    """
    # The shortest names that are all different: first the file names without their endings, then the last one, two,
    # three parts of the paths, and at last the paths themselves.
    parts = {path: Path(path).parts for path in paths}
    longest = max(map(len, parts.values()), default=0)
    choices = [[Path(path).stem for path in parts]]
    choices += [["/".join(folders[-count:]) for folders in parts.values()] for count in range(1, longest + 1)]
    names = next((choice for choice in choices if len(set(choice)) == len(parts)), list(parts))
    return dict(zip(names, parts, strict=True))
