"""Methods side by side, on the same calibration and the same evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, final

from ..adapters.lora import LoraScaling
from ..calibration.sources import TextCalibration
from ..calibration.tokens import CalibrationTokens
from ..calibration.windows import Calibration
from ..errors import ConfigurationError
from ..evaluation.tasks import Tasks
from ..evaluation.texts import EvaluationTexts
from ..families import Family
from ..methods.recipes import RECIPES, Recipe, find_recipe, resolved_name
from ..models.layers import ALL_LINEAR, Layer, linear_layers
from ..models.limits import check_token_ids, fitting_length
from ..models.load import empty_model, load_model, resolve_device
from ..pipeline.checkpoint import locked
from ..pipeline.checks import check_scaling, check_seed, check_tokens
from ..pipeline.fingerprint import digest, fingerprint
from ..pipeline.options import Resources
from ..pipeline.report import versions_in_words
from ..pipeline.targets import in_short, plan_adapter
from ..quantizers import NF4, Int8, Quantizer, Uniform
from ..solvers import Zero
from ..support.choices import StrPath
from ..support.files import check_writable, folder_of
from ..support.machine import within_memory
from ..support.settings import build, describe
from .runner import FULL_PRECISION, ComparisonRunner
from .sizes import ComparedFamilies, Sized
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


@final
@dataclass(frozen=True)
class ComparisonOutput:
    """Where a comparison is kept.

    Attributes:
        folder: for the results.
        fresh: forget earlier results in the folder.
        command: how the comparison was asked for, which its report names; empty if it was by a program.
    """

    folder: StrPath
    fresh: bool = False
    command: str = ""


@within_memory("shorter windows (`window_length`, `sequence_length`), or `device='cpu'`")
def compare(
    model: str,
    recipes: Sequence[str],
    calibration: Calibration = Calibration(),  # noqa: B008 # frozen
    *,
    out: ComparisonOutput | StrPath,
    ranks: Sequence[int] = (16,),
    families: ComparedFamilies = ComparedFamilies(),  # noqa: B008
    quantizer: Quantizer = NF4(),  # noqa: B008
    against: str = "quailora",
    baselines: Sequence[str] = tuple(BASELINES),
    texts: EvaluationTexts = EvaluationTexts(),  # noqa: B008
    tasks: Tasks = Tasks(),  # noqa: B008
    resources: Resources = Resources(),  # noqa: B008
) -> Comparison:
    """Compare methods on the same calibration data: perplexity, divergence, bytes and seconds.

    Every finished row is kept, so a comparison that was interrupted goes on, and recipes, ranks and baselines that are
    named later join those in the folder. Writes results.json, results.csv, results.md and report.html.
    `initialize_model` with the recipe of a row makes its adapter.

    Args:
        model: hub name, folder, .gguf file, or "demo"; it is held in memory.
        recipes: names of recipes, or "all".
        calibration: text to calibrate on, and how it is cut.
        out: folder for the results.
        ranks: ranks of the adapters.
        families: kinds of adapters beside LoRA, each about as large as LoRA of each rank.
        quantizer: of the base.
        against: the recipe that differences are taken from, by LoRA at the same rank.
        baselines: names of other bases to measure without an adapter, see `BASELINES`. Gaps are closed towards int8.
        texts: to measure on.
        tasks: of lm-eval to score every row on, too.
        resources: what of the machine to use; the model is always in memory.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    output = out if isinstance(out, ComparisonOutput) else ComparisonOutput(out)
    names = list(RECIPES) if "all" in recipes else [resolved_name(name) for name in recipes]
    against = resolved_name(against)
    chosen = {name: find_recipe(name) for name in dict.fromkeys((against, *names))}
    variants = [Variant.alone("base alone", quantizer), *map(baseline, baselines)]
    variants += [Variant.of(name, recipe, quantizer, rank) for rank in ranks for name, recipe in chosen.items()]
    check_families(families.chosen, chosen, quantizer)
    tasks.check()
    calibration.text.check()
    texts.check()
    folder = folder_of(output.folder)
    check_writable(folder)
    for variant in variants:
        variant.method.check()
    check_seed(calibration.seed)
    resolve_device(resources.device)

    # Everything above is checked before the model is loaded. The windows are drawn before any row is measured, since
    # rows of other windows cannot be compared: they are part of what the rows in the folder depend on.
    trusted = resources.trust_remote_code
    loaded = load_model(model, resources.dtype, resources.device, trust_remote_code=trusted)
    length = fitting_length(loaded.model, calibration.sequence_length, calibration.length)
    source = TextCalibration(replace(calibration, sequence_length=length))
    layers, targets = compared_layers(loaded.model, model, ranks, trust_remote_code=trusted)
    check_tokens(layers, source)
    for rank in ranks:
        sizes = families.sized(rank, targets)
        variants += [
            Variant.of(name, recipe, quantizer, rank, sized)
            for name, recipe in chosen.items()
            for sized in sizes
            if suits(sized.family, recipe, quantizer)
        ]
    seen = CalibrationTokens.of_windows(check_token_ids(loaded.model, source.calibration.windows(loaded.tokenizer)))
    windows = dict(texts.cut(loaded))
    settings = {"quantizer": describe(quantizer), "seed": calibration.seed, "calibration dtype": calibration.dtype}
    settings |= {"tasks": list(tasks.names), "limit of tasks": tasks.limit} if tasks.names else {}
    settings |= {f"text {name}": digest(ids) for name, ids in windows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "work"):
        store = RowStore(folder / "rows", fingerprint(settings, loaded, seen), output.fresh)
        store.open()
        place, seed = folder / "work", calibration.seed
        ComparisonRunner(loaded, layers, targets, source, seen, windows, tasks, place, store, seed).measure(variants)
    origin = {"command": output.command} if output.command else {}
    comparison = Comparison(
        title=f"{model}, {quantizer!r}",
        reference=against,
        texts=tuple(windows),
        tasks=tasks.names,
        rows=tuple(current_rows(store.rows(), quantizer)),
        origin=origin | {"date": datetime.now(UTC).date().isoformat(), "versions": versions_in_words()},
    )
    write_comparison(comparison, folder)
    return comparison


def check_families(families: Sequence[Family], recipes: Mapping[str, Recipe], quantizer: Quantizer) -> None:
    """Raise a `ConfigurationError` if a family goes with none of the recipes."""
    for family in families:
        if not any(suits(family, recipe, quantizer) for recipe in recipes.values()):
            raise ConfigurationError(
                f"The family {family.title} goes with none of the recipes {', '.join(recipes)}. Name one "
                "that keeps the base, on full inputs, such as shrunk."
            )


def suits(family: Family, recipe: Recipe, quantizer: Quantizer) -> bool:
    """Return whether a family can carry what a recipe finds; one that finds nothing is the base alone."""
    method = recipe.method(quantizer, LoraScaling())
    method = replace(method, initializer=replace(method.initializer, family=family))
    try:
        method.check()
    except ConfigurationError:
        return False
    return not isinstance(recipe.solver, Zero)


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
    for row in stored.values():
        if row.family is not None and row.recipe in RECIPES:
            sized = Sized(build(Family, row.family), row.size)  # type: ignore[type-abstract]
            possible.append(Variant.of(row.recipe, RECIPES[row.recipe], quantizer, row.rank, sized))
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
