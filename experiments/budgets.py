"""Budgets: plans against what is the same in all layers, at the same bytes; `python -m experiments.budgets --help`.

Each job is one model and one row of JSON. A job that was killed goes on where it ended, and jobs that are done are left
out. `docs/budgets.md` has what `draw` makes of the rows.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from typing_extensions import override

from quailora import NF4, Calibration, LoraScaling, Output, Quantizer, Resources, TextSource, Uniform
from quailora.budget.choices import Choice
from quailora.budget.measurements import Measurements
from quailora.budget.plan import Budget, BudgetPlan
from quailora.budget.planning import Planner
from quailora.methods.method import Method
from quailora.methods.recipes import find_recipe
from quailora.models.layers import Layer
from quailora.pipeline.formats import example_by
from quailora.pipeline.initialize_model import finished_run
from quailora.pipeline.plan import plan_run, source_of
from quailora.solvers import Zero

from .budgets_tables import draw
from .data import OTHER_TEXTS
from .jobs import Jobs
from .protocol import REFERENCE, Protocol
from .runs import RESULTS, Store
from .scored import BARE, Size, bytes_of, scores_of

BUDGETS = (3.5, 4.5)
"""Bits for each weight of the layers, adapters included."""

BASES: dict[str, Quantizer] = {
    "2 bits": Uniform(2, 32),
    "3 bits": Uniform(3, 64),
    "4 bits": Uniform(4, 64),
    "NF4": NF4(),
    "stock NF4": NF4(),
}
"""Bases that are the same in all layers; each gets the highest rank that the budget leaves. The stock one is rounded as
bitsandbytes rounds it while a model loads."""

POINTS: dict[str, tuple[Quantizer, int]] = {
    "3 bits + rank 16": (Uniform(3, 64), 16),
    "4 bits": (Uniform(4, 64), 0),
    "NF4 + rank 16": (NF4(), 16),
    "2 bits + rank 64": (Uniform(2, 32), 64),
}
"""Models that are the same in all layers, with whose bytes plans are made as well; a rank of 0 is no adapter."""

PLANS = {"plan": "gptq", "plan of NF4": "nf4", "plan of stock NF4": "stock"}
"""Plans of AutoGPTQ's format, of bitsandbytes', and of ranks alone; with the folder of the measurements of each."""

SIZE = Size(samples=64, sequence_length=512)


def jobs() -> list[str]:
    """Return the names of all jobs, most important first: budget, what is chosen, and seed."""
    found = []
    for seed in (0, 1, 2):
        for budget in BUDGETS:
            names = [name for name, quantizer in BASES.items() if bits_of(quantizer) <= budget]
            plans = [name for name in PLANS if name == "plan" or "NF4" in names]
            found += [f"{budget}/{what}/{seed}" for what in (*plans, *reversed(names), "skips")]
        found += [f"{point}/{what}/{seed}" for point in POINTS for what in ("same", "plan")]
    return found


def bits_of(quantizer: Quantizer) -> float:
    """Return the bits of a weight of a layer."""
    return example_by(quantizer, (576, 576)).bits_per_weight


class Budgets(Jobs):
    """What models of the same bytes predict, whose bits and ranks were chosen in different ways.

    Args:
        plans: folder with three folders of `quailora plan`, whose measurements plans are made from: "gptq", "nf4" of
            `--format bitsandbytes`, and "stock" of the same with `--bits 4`.
        texts: folder with WikiText-2, validation and test, and C4.
        folder: folder for jobs that are not finished.
        results: folder of the results.
        device: what computes, as `quailora init` takes it.
        model: hub name or folder of the model, or "demo".
        size: how much text is used.
    """

    def __init__(
        self,
        plans: Path = Path("plans"),
        texts: Path = Path("texts"),
        folder: Path = Path("runs/budgets"),
        results: Path = RESULTS,
        device: str = "auto",
        model: str = "demo",
        size: Size = SIZE,
    ) -> None:
        self._protocol: Protocol = replace(REFERENCE, model=model)
        self._plans, self._texts, self._device, self._size = plans, texts, device, size
        super().__init__(Store(self._protocol, results, "budgets"), folder)

    def draw(self, page: Path = Path("docs/budgets.md")) -> None:
        """Write the tables into the documentation.

        Args:
            page: the page.
        """
        draw(self._store.rows(), page)

    @override
    def _jobs(self) -> list[str]:
        return jobs()

    def _asked(self, budget: str, what: str) -> tuple[Method, list[str], BudgetPlan | None]:
        """Return the method of a job, the layers with an adapter, and the plan, if there is one."""
        measured = Measurements.read(self._plans / PLANS.get(what, "gptq") / "measurements.json")
        planner, shapes = Planner(measured), [layer.shape for layer in measured.layers.values()]
        sides = sum(map(sum, shapes))
        if budget in POINTS:
            quantizer, rank = POINTS[budget]
            nbytes = bytes_of(quantizer, shapes) + 2 * rank * sides
            if what == "same":
                recipe = find_recipe("best-joint") if rank else BARE
                return recipe.method(quantizer, LoraScaling(max(1, rank))), ["all-linear"], None
        else:
            nbytes = Budget(f"{budget}bits").nbytes(measured.weights, measured.other_bytes)
        if what in PLANS:
            plan = planner.within(nbytes, f"{budget} bits")
            if plan.targets:
                return plan.method(), plan.targets, plan
            return BARE.method(plan.quantizer, LoraScaling(1), quantizers=plan.quantizers), ["all-linear"], plan
        if what == "skips":
            found = planner.skipping(nbytes)
            assert found is not None  # there are choices as small as every budget
            return BARE.method(found.quantizer, LoraScaling(1), quantizers=found.quantizers), ["all-linear"], found
        # The highest rank whose bytes fit, even if it is not one of those that plans choose from.
        rank = int((nbytes - bytes_of(BASES[what], shapes)) // (2 * sides))
        recipe = find_recipe("best" if what.startswith("stock") else "best-joint")
        return recipe.method(BASES[what], LoraScaling(max(1, rank))), ["all-linear"], None

    @override
    def _row(self, job: str) -> dict[str, Any]:
        """Make the model of a job, and return its scores."""
        budget, what, seed = job.split("/")
        method, targets, planned = self._asked(budget, what)
        text = TextSource(str(self._texts / OTHER_TEXTS["wikitext2"]))
        source = source_of(Calibration(text, self._size.samples, self._size.sequence_length, seed=int(seed)))
        output = Output(self._folder / job.replace("/", "-"))
        resources = Resources(device="auto" if self._device == "auto" else "cpu")
        plan = plan_run(self._protocol.model, method, source, targets, output, resources)
        began = time.monotonic()
        with finished_run(plan) as finished:
            assert finished is not None
            seconds = time.monotonic() - began
            loaded, layers = finished.loaded, finished.run.layers
            return {
                "scores": scores_of(loaded, layers, {"made": finished.finished}, self._texts, self._size),
                **sizes(loaded.model, layers, method, finished.records),
                "expected": None if planned is None else planned.divergence,
                "rank": method.scaling.rank,
                "seconds": round(seconds),
            }


def sizes(model: Any, layers: Mapping[str, Layer], method: Method, records: Any) -> dict[str, Any]:
    """Return the bytes of base and adapter, and how many layers have which bits.

    Args:
        model: the model in full precision.
        layers: the layers of the base that are quantized.
        method: how.
        records: entries of the report, one for each layer with an adapter.
    """
    kept = [model.get_submodule(name).weight for name in method.kept]
    counted: dict[str, int] = {"16 bits": len(kept)} if kept else {}
    base = 2.0 * sum(weight.numel() for weight in kept)
    for layer in layers.values():
        quantizer = method.initializer_of(layer).quantizer
        assert quantizer is not None
        title = Choice(quantizer).base
        counted[title] = counted.get(title, 0) + 1
        base += bytes_of(quantizer, [layer.shape])
    bare = isinstance(method.initializer.solver, Zero)
    return {"bytes": base, "adapter": 0 if bare else sum(record.numbers for record in records), "layers": counted}


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    auto_cli(Budgets, as_positional=False)
    sys.exit(0)
