"""What `quailora plan` does: it measures a model, chooses for all layers, and writes the plan with what it buys."""

from __future__ import annotations

import csv
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..budget.choices import FULL_BITS, Choice, possible_choices
from ..budget.layer_errors import quantizers_of
from ..budget.measurements import Measurements
from ..budget.measuring import measure_model, planned
from ..budget.plan import PLAN_FILE, Budget, BudgetPlan
from ..budget.planning import Planner, Point, by_kind, frontier
from ..budget.plot import plot_frontier
from ..budget.question import PlanRecipe, Question
from ..calibration.sources import TextCalibration
from ..errors import ConfigurationError, OutputExistsError
from ..models.layers import Layer
from ..pipeline.estimate import parameter_bytes
from ..pipeline.options import Resources
from ..pipeline.plan import RunPlan
from ..quantizers import Quantizer
from ..support.choices import PLANNED_BITS
from ..support.files import check_writable, complete_file, folder_of
from ..support.machine import size
from ..support.tables import print_note, print_table
from .initializing import calibration_of

logger = logging.getLogger("quailora")

MEASURED, FRONTIER, PLOT, STATE = "measurements.json", "frontier.csv", "frontier.svg", "measuring"
"""What is in the folder beside the plan; the last one is the state of a measurement that is not finished."""


@final
@dataclass(frozen=True)
class PlanResult:
    """What `plan` returns.

    Attributes:
        folder: the folder with the plan.
        model: the model as it was named.
        plan: the plan.
        points: what budgets buy, from small to large.
        uniform: the best choice of the same bytes that is the same for all layers, and its expected divergence.
        skipping: expected divergence of one quantizer, no adapter and some layers in full precision.
    """

    folder: Path
    model: str
    plan: BudgetPlan
    points: Sequence[Point]
    uniform: tuple[Choice, float] | None
    skipping: float | None

    def show(self) -> None:
        """Print what layers become, what that buys, and what comes next."""
        plan = self.plan
        rows = []
        for kind, layers in by_kind(plan).items():
            bases = [layer.choice.base for layer in layers]
            counted = ", ".join(f"{bases.count(base)} x {base}" for base in sorted(set(bases)))
            ranks = [layer.choice.rank for layer in layers]
            rows.append([
                kind,
                counted,
                f"{min(ranks)}-{max(ranks)}",
                f"{8 * sum(layer.nbytes for layer in layers) / sum(layer.weights for layer in layers):.2f}",
                number(sum(layer.divergence for layer in layers)),
            ])
        title = f"{self.folder}: {len(plan.layers)} layers, {plan.bits:.2f} bits a weight, {size(plan.nbytes)}"
        print_table(title, ("layers", "bases", "ranks", "bits a weight", "expected cost (nats)"), rows)
        print_table(
            "What budgets buy: expected divergence from full precision, nats per token",
            ("bits a weight", "plan", "the same everywhere", "", "16-bit skips alone"),
            [
                [f"{point.bits:.2f}", number(point.plan), number(point.uniform), point.uniform_title,
                 number(point.skipping)]
                for point in thinned(self.points)
            ],
        )  # fmt: skip
        print_note(
            f"Expected divergence {number(plan.divergence)}"
            + ("" if self.uniform is None else f", with {self.uniform[0].title} everywhere {number(self.uniform[1])}")
            + ("" if self.skipping is None else f", with 16-bit skips alone {number(self.skipping)}")
            + f". Next: quailora init {self.model} --plan {self.folder} --out adapter --calibration TEXT"
        )


def number(value: float | None) -> str:
    """Return a divergence for a table."""
    return "-" if value is None else f"{value:.3g}"


def thinned(points: Sequence[Point], most: int = 16) -> list[Point]:
    """Return some of many points, the first and the last among them."""
    step = max(1, -(-(len(points) - 1) // (most - 1)))
    return [point for number, point in enumerate(points) if number % step == 0 or number == len(points) - 1]


def run_plan(options: Mapping[str, Any]) -> PlanResult:
    """Plan as the options say, and write the folder.

    Args:
        options: every option of `quailora plan` by name.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    if (options["budget"] is None) == (options["quality"] is None):
        raise ConfigurationError("Expected either `budget`, such as 3.5bits or 2GiB, or `quality`, in nats per token.")
    if options["quality"] is not None and not 0 < options["quality"] < math.inf:
        raise ConfigurationError(f"Expected a divergence above 0 as quality, got {options['quality']}. Try 0.1.")
    budget = None if options["budget"] is None else Budget(options["budget"])
    folder = folder_of(options["out"])
    check_writable(folder)
    kept = [name for name in (PLAN_FILE, MEASURED) if (folder / name).exists()]
    again = options["measurements"] is not None and folder_of(options["measurements"]) == folder
    if kept and not options["overwrite"] and not (again and PLAN_FILE not in kept):
        raise OutputExistsError(
            f"{folder} already holds a plan ({', '.join(kept)}). Choose another folder, or pass `overwrite=True`. With "
            f"`measurements={folder}` another budget takes no measuring."
        )
    measured = measured_for(options, budget, folder)
    # The measurements are written first, so that nothing which fails later loses them, such as a budget that no plan
    # stays within. The state that they came from can go then.
    folder.mkdir(parents=True, exist_ok=True)
    measured.write(folder / MEASURED)
    shutil.rmtree(folder / STATE, ignore_errors=True)
    planner = Planner(measured, options["fused"])
    if budget is not None:
        plan = planner.within(budget.nbytes(measured.weights, measured.other_bytes), budget.text)
    else:
        plan = planner.of_quality(options["quality"], f"{options['quality']:g} nats per token")
    if not plan.targets:
        logger.warning("No layer of this plan has an adapter. Leave 0 out of `ranks` for a model that can be trained.")
    points = frontier(planner)
    plan.write(folder / PLAN_FILE)
    write_points(points, folder / FRONTIER)
    plot_frontier(points, str(options["model"]), folder / PLOT)
    skipping = planner.skipping(plan.nbytes)
    return PlanResult(
        folder,
        str(options["model"]),
        plan,
        points,
        planner.uniform(plan.nbytes),
        None if skipping is None else skipping.divergence,
    )


def measured_for(options: Mapping[str, Any], budget: Budget | None, folder: Path) -> Measurements:
    """Return the measurements of a model: those that are there, or new ones.

    Raises:
        ConfigurationError: if those that are there are of another model, or no plan stays within the budget.
    """
    if options["measurements"] is not None:
        place = Path(options["measurements"]).expanduser()
        known = Measurements.read(place / MEASURED if place.is_dir() else place)
        if known.model != str(options["model"]):
            logger.warning("These measurements are of %s; they are taken for %s.", known.model, options["model"])
        return known
    base_format = options["format"]
    bits = tuple(options["bits"])
    if base_format == "bitsandbytes" and bits == PLANNED_BITS:  # of which this format holds two
        bits = (4, FULL_BITS)
    choices = possible_choices(
        base_format, bits, options["ranks"], options["group_sizes"], symmetric=options["symmetric"]
    )
    # NF4 everywhere is the base that every package makes. Any other one has to be written, and then it may be chosen.
    recipe: PlanRecipe = options["recipe"] or (
        "best" if base_format == "bitsandbytes" and FULL_BITS not in bits else "best-joint"
    )
    resources = Resources(options["dtype"], options["device"], "never", trust_remote_code=options["trust_remote_code"])
    source = TextCalibration(calibration_of(options))
    model = str(options["model"])
    run = planned(model, Question(choices, choices[0], recipe), source, resources)
    question = Question(choices, reference_for(run, choices, budget), recipe)
    return measure_model(run, question, folder / STATE, fresh=options["fresh"])


def reference_for(run: RunPlan, choices: Sequence[Choice], budget: Budget | None) -> Choice:
    """Return the choice for the network that layers are measured in: the largest base within the budget, and its rank.

    Args:
        run: the model.
        choices: the choices.
        budget: the budget; None for a plan of some quality, which is measured around 4 bits.

    Raises:
        ConfigurationError: if no plan stays within the budget.
    """
    quantized = [choice for choice in choices if choice.quantizer is not None]
    if budget is None:
        return min(quantized, key=lambda choice: (abs(getattr(choice.quantizer, "bits", 4) - 4), choice.rank))
    # Bytes follow from shapes, so a budget that nothing fits is refused before a weight is read.
    layers = run.adapter.layers
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    allowed = budget.nbytes(weights, other_bytes(run, layers))
    totals = {choice: sum(choice.nbytes(layer) for layer in layers.values()) for choice in quantized}
    least = min(totals.values())
    if least > allowed:
        raise ConfigurationError(
            f"The smallest choice takes {8 * least / weights:.2f} bits a weight, or {size(least)}, and the budget "
            f"{budget.text} leaves {size(max(0, int(allowed)))} for the layers. Raise it, or give fewer bits or lower "
            "ranks to choose from."
        )
    # The base comes first: few bits with a high rank leave more errors than the same bytes spent on another bit.
    fitting = [choice for choice in quantized if totals[choice] <= allowed]
    bases: dict[Quantizer | None, int] = {
        one: sum(Choice(one).nbytes(layer) for layer in layers.values()) for one in quantizers_of(fitting)
    }
    return max(fitting, key=lambda choice: (bases[choice.quantizer], choice.rank))


def other_bytes(run: RunPlan, layers: Mapping[str, Layer]) -> int:
    """Return the bytes of a model without some layers, as it is stored now."""
    own = sum(layer.shape[0] * layer.shape[1] for layer in layers.values()) * run.empty.dtype.itemsize
    return sum(parameter_bytes(run.empty).values()) - int(own)


def write_points(points: Sequence[Point], file: Path) -> None:
    """Write what budgets buy as a table of comma-separated values."""
    with complete_file(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("bits", "plan", "uniform", "uniform_choice", "skipping"))
        writer.writerows(
            (point.bits, point.plan, point.uniform, point.uniform_title, point.skipping) for point in points
        )
