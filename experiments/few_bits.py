"""Few bits: bases of 2 to 4 bits with adapters, before and after each stage; `python -m experiments.few_bits --help`.

Each job is one model and one row of JSON. A job that was killed goes on where it ended, and jobs that are done are left
out. `docs/few-bits.md` has what `draw` makes of the rows.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from typing_extensions import override

from quailora import NF4, Calibration, Int8, LoraScaling, Output, Quantizer, Resources, Sign, TextSource, Uniform
from quailora.methods.block_training import BlockTraining
from quailora.methods.distillation import Distillation
from quailora.methods.recipes import Recipe, find_recipe
from quailora.models.layers import all_layers, block_of
from quailora.models.load import load_model
from quailora.pipeline.initialize_model import finished_run, model_run
from quailora.pipeline.loading import loaded_model, work_folder
from quailora.pipeline.plan import RunPlan, plan_run, source_of
from quailora.pipeline.store import MemoryStore, StoredLayer
from quailora.solvers import Zero

from .auto_rounding import auto_rounded, shuffled_windows
from .data import OTHER_TEXTS
from .few_bits_tables import draw
from .first_block import trained_first_block
from .jobs import Jobs
from .protocol import REFERENCE, Protocol
from .runs import RESULTS, Store
from .scored import BARE, Size, bytes_of, scores_of

SIGNS = "signs, groups of 64"
"""A base of 1 bit and a scale for each group, which no package loads."""

BASES: dict[str, Quantizer] = {
    "2 bits, groups of 32": Uniform(2, 32),
    "2 bits, groups of 64": Uniform(2, 64),
    "3 bits, groups of 64": Uniform(3, 64),
    "4 bits, groups of 64": Uniform(4, 64),
    "NF4": NF4(),
    "int8": Int8(),
    SIGNS: Sign(64),
}

WITHOUT: dict[str, Recipe] = {
    "nearest": Recipe("no adapter, rounded to nearest", Zero(), inputs="quantized"),
    "bare": BARE,
    "bare-trained": replace(BARE, blocks=BlockTraining(code_rate=1e-3, parts=("codes", "scales"))),
}
"""Bases without an adapter: as stock packages round them, as `best-joint` does, and trained by blocks after that."""

DIAL = (120, 480, 960)
"""Steps of the distillations that begin with the same adapters, in jobs whose recipe names a learning rate."""

RATES = (3e-4, 1e-3)
"""Learning rates of these distillations."""

STEPS = 120
"""Steps of the distillation that ends a job of the first seed; rows have the model before it as well."""


SIZE = Size()


def jobs() -> list[str]:
    """Return the names of all jobs, most important first: base, recipe or "blocks", rank (0: no adapter) and seed."""
    own = [base for base in BASES if base not in ("int8", SIGNS)]
    two, four = own[:2], own[2:]
    trained = [f"{base}/block-trained-joint/{rank}/{seed}" for seed in (0, 1, 2) for base in two for rank in (16, 64)]
    closed = [f"{base}/best-joint/{rank}/0" for base in own for rank in (16, 64)]
    others = [f"{base}/block-trained-joint/16/0" for base in four]
    dials = [f"NF4/block-trained at {RATES[0]:g}/16/{seed}" for seed in (0, 1, 2)]
    dials += [f"NF4/block-trained at {rate:g}/16/0" for rate in RATES[1:]]
    return [
        *trained,
        *(f"{base}/nearest/0/0" for base in ("NF4", "int8")),
        *dials,
        *closed,
        *(f"{base}/{recipe}/0/0" for base in list(BASES)[:4] for recipe in ("bare", "bare-trained", "auto-round")),
        *(f"{base}/blocks/{rank}/0" for base in two for rank in (0, 16, 64)),
        "3 bits, groups of 64/blocks/0/0",
        *(f"{base}/signed steps/{rank}/0" for base in two for rank in (0, 16, 64)),
        *others,
        *(f"NF4/best/16/{seed}" for seed in (0, 1, 2)),
        f"{SIGNS}/nearest/0/0",
        *(f"{SIGNS}/block-trained-joint/{rank}/0" for rank in (16, 64)),
    ]


class FewBits(Jobs):
    """What models of few bits predict, with adapters that make up for their errors.

    Args:
        texts: folder with WikiText-2, validation and test, and C4.
        folder: folder for jobs that are not finished.
        results: folder of the results.
        device: what computes, as `quailora init` takes it.
        model: hub name or folder of the model, or "demo".
        size: how much text is used.
    """

    def __init__(
        self,
        texts: Path = Path("texts"),
        folder: Path = Path("runs/few-bits"),
        results: Path = RESULTS,
        device: str = "auto",
        model: str = "demo",
        size: Size = SIZE,
    ) -> None:
        self._protocol: Protocol = replace(REFERENCE, model=model)
        self._texts, self._device, self._size = texts, device, size
        super().__init__(Store(self._protocol, results, "few-bits"), folder)

    def draw(self, page: Path = Path("docs/few-bits.md")) -> None:
        """Write the tables into the documentation.

        Args:
            page: the page.
        """
        draw(self._store.rows(), page)

    @override
    def _jobs(self) -> list[str]:
        return jobs()

    @override
    def _row(self, job: str) -> dict[str, Any]:
        kinds = {"blocks": self._blocks, "signed steps": self._blocks, "auto-round": self._auto_rounded}
        return kinds.get(job.split("/")[1], self._made)(job)

    def _plan(self, recipe: Recipe, base: str, rank: int, seed: int = 0, out: Path | None = None) -> RunPlan:
        """Return the plan of a run on the calibration text."""
        text = TextSource(str(self._texts / OTHER_TEXTS["wikitext2"]))
        samples = 1 if recipe is WITHOUT["nearest"] else self._size.samples  # rounding to nearest does not see the text
        source = source_of(Calibration(text, samples, self._size.sequence_length, seed=seed))
        method = recipe.method(BASES[base], LoraScaling(max(1, rank)))
        resources = Resources(device="auto" if self._device == "auto" else "cpu")
        output = None if out is None else Output(out)
        return plan_run(self._protocol.model, method, source, ["all-linear"], output, resources)

    def _blocks(self, job: str) -> dict[str, Any]:
        """Train the first block of the model with all settings; return its errors before and after each training."""
        base, kind, rank, _ = job.split("/")
        quantizer = BASES[base]
        assert isinstance(quantizer, Uniform)
        plan = self._plan(find_recipe("best-joint") if int(rank) else BARE, base, int(rank))
        loaded = loaded_model(plan, None)
        targets = plan.adapter.of(all_layers(loaded.model))
        run = model_run(plan, loaded, targets, plan.source.tokens(loaded.tokenizer), MemoryStore())
        return {"blocks": trained_first_block(run, quantizer, signed=kind == "signed steps", adapters=bool(int(rank)))}

    def _made(self, job: str) -> dict[str, Any]:
        """Make the model of a job, and return its scores before and after each distillation."""
        base, name, rank, seed = job.split("/")
        name, _, rate = name.partition(" at ")
        plan = self._plan(recipe_of(name), base, int(rank), int(seed), self._folder / job.replace("/", "-"))
        work = work_folder(plan)
        goes_on = work is not None and work.exists()  # from an earlier process, whose time is not known
        began = time.monotonic()
        with finished_run(plan) as finished:
            assert finished is not None
            run, spent = finished.run, {"undistilled": time.monotonic() - began}
            stages = {"undistilled": run.finished("")}
            for title, distillation in distillations(name, rate, int(seed)).items():
                began = time.monotonic()
                run.distil("", distillation, plan.source, finished.loaded.tokenizer)
                stages[title] = run.finished("", distillation)
                spent[title] = time.monotonic() - began
            records = finished.records
            blocks = {block_of(record.name): record for record in records}
            return {
                "scores": scores_of(finished.loaded, run.layers, stages, self._texts, self._size),
                "bytes": sum(record.bits_per_weight * record.shape[0] * record.shape[1] for record in records) / 8,
                "adapter": 0 if name in WITHOUT else sum(record.numbers for record in records),
                "blocks": [(one.block_error, one.block_error_trained) for one in blocks.values()],
                "seconds": {stage: None if goes_on else round(seconds) for stage, seconds in spent.items()},
            }

    def _auto_rounded(self, job: str) -> dict[str, Any]:
        """Let the package auto-round make a base without an adapter, from as many tokens, and return its scores."""
        base, _, _, seed = job.split("/")
        quantizer, training = BASES[base], BlockTraining()
        assert isinstance(quantizer, Uniform)
        rounded = load_model(self._protocol.model, "float32", "cpu")  # the package moves block after block itself
        text = (self._texts / OTHER_TEXTS["wikitext2"]).read_text(encoding="utf-8")
        size = self._size.samples, self._size.sequence_length
        windows = shuffled_windows(text, rounded.tokenizer, *size, int(seed))
        began = time.monotonic()
        weights = auto_rounded(rounded, windows, quantizer, training.steps, training.tokens, int(seed))
        seconds = time.monotonic() - began
        loaded = load_model(self._protocol.model, dtype="float32")
        layers = all_layers(loaded.model)
        stages = {"undistilled": {name: StoredLayer(dequantized=weight) for name, weight in weights.items()}}
        return {
            "scores": scores_of(loaded, layers, stages, self._texts, self._size),
            "bytes": bytes_of(quantizer, (layer.shape for layer in layers.values())),
            "adapter": 0,
            "blocks": [],
            "seconds": {"undistilled": round(seconds)},
        }


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name, here or for the command line."""
    return WITHOUT[name] if name in WITHOUT else find_recipe(name)


def distillations(name: str, rate: str, seed: int) -> dict[str, Distillation]:
    """Return the distillations of a job, by the names that its scores get.

    Args:
        name: name of its recipe.
        rate: learning rate that the job names, if it does.
        seed: seed of the job. Unless the job names a rate, only the first seed is distilled.
    """
    if name in WITHOUT:
        return {}
    if rate:
        return {f"{steps} steps": Distillation(steps, learning_rate=float(rate)) for steps in DIAL}
    return {"distilled": Distillation(STEPS)} if seed == 0 else {}


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    auto_cli(FewBits, as_positional=False)
    sys.exit(0)
