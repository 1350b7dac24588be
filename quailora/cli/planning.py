"""What `quailora plan` does: it measures a model, chooses for all layers, and writes the plan with what it buys."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, final

from ..budget.choices import Choice, possible_choices
from ..budget.measure_choices import measure_choices
from ..budget.measurements import MEASURED, Measurements
from ..budget.plan import PLAN_FILE, Budget, BudgetPlan
from ..budget.planning import Planner, Point, check_quality
from ..budget.plot import plot_frontier
from ..errors import ConfigurationError, OutputExistsError
from ..models.layers import linear_layers
from ..models.load import empty_model
from ..pipeline.checkpoint import remove_state
from ..pipeline.formats import FULL_BITS
from ..pipeline.options import Resources
from ..support.choices import PLANNED_BITS, PLANNED_RANKS
from ..support.files import check_writable, complete_file, folder_of
from ..support.machine import size
from ..support.tables import print_note, print_table
from .initializing import calibration_of

logger = logging.getLogger("quailora")

_AGAIN = ("model", "out", "budget", "quality", "bits", "ranks", "fused", "measurements", "overwrite")
"""Options that mean something beside measurements which are there already."""

FRONTIER, PLOT, STATE = "frontier.csv", "frontier.svg", "measuring"
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
        title = f"{self.folder}: {len(plan.layers)} layers, {plan.bits:.2f} bits a weight, {size(plan.nbytes)}"
        print_table(title, *plan.table())
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
            + f". Next: {self.following}"
        )

    @property
    def following(self) -> str:
        """The command that comes next: it makes the model, or a plan with adapters if this one has none."""
        if self.plan.targets:
            return f"quailora init {self.model} --plan {self.folder} --out adapter --calibration TEXT"
        return (
            f"quailora plan {self.model} --measurements {self.folder} --budget BUDGET --ranks RANKS_ABOVE_0 --out PLAN"
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
    if options["quality"] is not None:
        check_quality(options["quality"])
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
    measured = measured_for(options, folder)
    # The measurements are written first, so that nothing which fails later loses them, such as a budget that no plan
    # stays within. The state that they came from can go then.
    folder.mkdir(parents=True, exist_ok=True)
    measured.write(folder / MEASURED)
    if options["measurements"] is None:
        remove_state(folder / STATE)
    planner = Planner(measured, options["fused"], allowed_of(options, measured))
    plan = planner.of_quality(options["quality"]) if budget is None else planner.of_budget(budget)
    if not plan.targets:
        logger.warning(
            "No layer of this plan has an adapter. Leave 0 out of `ranks`, also with these `measurements`, for a model "
            "that can be trained."
        )
    points = planner.frontier()
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


def measured_for(options: Mapping[str, Any], folder: Path) -> Measurements:
    """Return the measurements of a model: those that are there, or new ones.

    Raises:
        ConfigurationError: if options say how to measure what has been measured, or no plan stays within the budget.
    """
    if options["measurements"] is not None:
        check_unused(options)
        known = Measurements.read(options["measurements"])
        if known.model != str(options["model"]):
            check_same_layers(known, options)
        return known
    base_format = options["format"]
    bits = tuple(options["bits"])
    if base_format == "bitsandbytes" and bits == PLANNED_BITS:  # of which this format holds two
        bits = (4, FULL_BITS)
    return measure_choices(
        str(options["model"]),
        calibration_of(options),
        choices=possible_choices(
            base_format, bits, options["ranks"], options["group_sizes"], symmetric=options["symmetric"]
        ),
        around=options["budget"],
        recipe=options["recipe"],
        state=folder / STATE,
        fresh=options["fresh"],
        resources=Resources(options["dtype"], options["device"], trust_remote_code=options["trust_remote_code"]),
    )


def check_unused(options: Mapping[str, Any]) -> None:
    """Raise a `ConfigurationError` if options beside `measurements` say how to measure."""
    from .commands.plan import plan

    # Options of several values come as lists or as tuples.
    defaults = {name: parameter.default for name, parameter in signature(plan).parameters.items()}
    given = [name for name in defaults if name not in _AGAIN and plain(options[name]) != plain(defaults[name])]
    if given:
        raise ConfigurationError(
            f"The measurements are there already, and nothing is measured, got {', '.join(given)} as well. Leave that "
            "out, or leave out `measurements` to measure anew."
        )


def check_same_layers(known: Measurements, options: Mapping[str, Any]) -> None:
    """Raise a `ConfigurationError` if measurements are of layers that a model does not have; warn if it has all."""
    empty = empty_model(str(options["model"]), trust_remote_code=options["trust_remote_code"])
    layers = {name: layer.shape for name, layer in linear_layers(empty).items()}
    measured = {name: layer.shape for name, layer in known.layers.items()}
    if layers.keys() != {**measured, **known.others}.keys() or not measured.items() <= layers.items():
        raise ConfigurationError(
            f"These measurements are of {known.model}, which has other layers than {options['model']}. Leave out "
            "`measurements` to measure this model."
        )
    logger.warning("These measurements are of %s; they are taken for %s.", known.model, options["model"])


def plain(value: Any) -> Any:
    """Return the value of an option, lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


def allowed_of(options: Mapping[str, Any], measured: Measurements) -> tuple[Choice, ...]:
    """Return those of the measured choices that have the bits and the ranks which were asked for.

    Raises:
        ConfigurationError: if bits or ranks were asked for that have not been measured.
    """
    if options["measurements"] is None:
        return measured.choices
    bits, ranks = set(options["bits"]), set(options["ranks"])
    ranks_known = {choice.rank for choice in measured.choices if choice.quantizer}
    known = {choice.bits for choice in measured.choices}, ranks_known
    # Without these options, all that was measured is there to choose from.
    wanted = known[0] if bits == set(PLANNED_BITS) else bits, known[1] if ranks == set(PLANNED_RANKS) else ranks
    unknown = sorted(wanted[0] - known[0]), sorted(wanted[1] - known[1])
    if any(unknown):
        raise ConfigurationError(
            f"Expected bits and ranks that were measured, which are {sorted(known[0])} and {sorted(known[1])}, got "
            f"{sorted(wanted[0])} and {sorted(wanted[1])}. Leave out `measurements` to measure anew."
        )
    # A layer in full precision has no rank to choose.
    found = [one for one in measured.choices if one.bits in wanted[0] and (one.rank in wanted[1] or not one.quantizer)]
    if not any(choice.quantizer for choice in found):
        raise ConfigurationError(f"Expected a choice that quantizes layers, got {sorted(wanted[0])} bits only.")
    return tuple(found)


def write_points(points: Sequence[Point], file: Path) -> None:
    """Write what budgets buy as a table of comma-separated values."""
    with complete_file(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("bits", "plan", "uniform", "uniform_choice", "skipping"))
        writer.writerows(
            (point.bits, point.plan, point.uniform, point.uniform_title, point.skipping) for point in points
        )
