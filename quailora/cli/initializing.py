"""What `quailora init` does: it makes typed values from its options, calls the library, and prints a summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ..adapters.lora import LoraScaling
from ..bases import StoredBase
from ..budget.plan import BudgetPlan
from ..calibration.sources import TextCalibration
from ..calibration.text import TextSource
from ..calibration.windows import Calibration
from ..core.weightings import GramWeighting, Weighting
from ..errors import ConfigurationError
from ..families import Family, Lora
from ..layer.initializer import Initializer
from ..methods.distillation import Distillation
from ..methods.method import Method
from ..methods.recipes import find_recipe, resolved_name
from ..models.layers import ALL_LINEAR
from ..pipeline.estimate import Estimate
from ..pipeline.initialize_model import carry_out
from ..pipeline.options import Output, Resources
from ..pipeline.plan import default_scaling, plan_run
from ..pipeline.report import error_summary
from ..quantizers import NF4, Quantizer
from ..solvers import AlternatingLeastSquares, Solver
from ..support.choices import InputsOf
from ..support.files import as_str
from ..support.tables import print_note, print_table
from .next_steps import next_steps

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class InitResult:
    """What `init` returns.

    Attributes:
        out: folder of the adapter.
        report: content of its `report.json`; None in all but the first of several processes.
    """

    out: Path
    report: Mapping[str, Any] | None

    def show(self) -> None:
        """Print a summary and what comes next; only the first of several processes has one."""
        if self.report is not None:
            self.show_errors(self.report)
            print_note(next_steps(self.out))

    def show_errors(self, report: Mapping[str, Any]) -> None:
        """Print a summary of the errors of layers.

        Args:
            report: content of `report.json`.
        """
        title, header, rows = error_summary(report)
        print_table(f"{self.out}: {title}", header, rows)


def calibration_of(options: Mapping[str, Any]) -> Calibration:
    """Return the calibration data that the options of `init` and `compare` describe."""
    fields = tuple(options["calibration_fields"])
    return Calibration(
        TextSource(as_str(options["calibration"]), fields, options["calibration_split"]),
        options["samples"],
        options["sequence_length"],
        options["seed"],
        options["calibration_dtype"],
        options["bos"],
    )


def run_init(options: Mapping[str, Any]) -> InitResult | Estimate:
    """Initialize an adapter as the options say; with a dry run, only return the estimate of memory and time.

    Args:
        options: every option of `quailora init` by name, with objects for quantizer, solver and metric.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    source = calibration_of(options)
    patterns = options["rank_pattern"] or {}, options["alpha_pattern"] or {}
    rank = asked_rank(options["rank"], options["family"])
    scaling = LoraScaling(rank, options["alpha"], options["rslora"], *patterns)
    asked = Asked(options["solver"], options["metric"], options["inputs"])
    targets = options["targets"]
    if options["plan"] is None:
        method = asked_method(options["recipe"], options["quantizer"], as_str(options["base"]), scaling, asked)
    else:
        budget = asked_plan(options, asked)
        method, targets = budget.method(options["recipe"], scaling), budget.targets
    initializer = replace(method.initializer, family=options["family"])
    distillation = asked_distillation(method.distillation, options)
    method = replace(method, initializer=initializer, frozen_rank=options["frozen_rank"], distillation=distillation)
    output = Output(
        options["out"],
        overwrite=options["overwrite"],
        fresh=options["fresh"],
        save_base=options["save_base"],
        base_format=options["base_format"],
        factors_dtype=options["factors_dtype"],
        modules_to_save=tuple(options["modules_to_save"]),
        push_to_hub=options["push_to_hub"],
    )
    resources = Resources(
        options["dtype"],
        options["device"],
        options["offload"],
        options["memory_limit"],
        options["allow_pickle"],
        options["trust_remote_code"],
    )
    # The same two steps as in `initialize_model`. Between them a dry run ends.
    plan = plan_run(str(options["model"]), method, TextCalibration(source), targets, output, resources)
    if options["dry_run"]:
        return plan.estimate
    result = carry_out(plan)
    return InitResult(Path(plan.output.folder if plan.output else output.folder), result.report)


def asked_plan(options: Mapping[str, Any], asked: Asked) -> BudgetPlan:
    """Return the budget plan that was asked for.

    Args:
        options: every option of `quailora init` by name.
        asked: the parts of a method that were asked for.

    Raises:
        ConfigurationError: if an option contradicts the plan.
        ModelError: if the plan cannot be read.
    """
    defaults = {"quantizer": None, "base": None, "rank": None, "rank_pattern": None, "alpha_pattern": None}
    given = [name for name, default in defaults.items() if options[name] != default]
    given += ["targets"] if tuple(options["targets"]) != (ALL_LINEAR,) else []
    given += ["solver, metric or inputs"] if asked != Asked() else []
    family = options["family"]
    given += [f"the family {family.title}"] if family is not None and not isinstance(family, Lora) else []
    if given:
        raise ConfigurationError(
            "A budget plan decides bits, targets and ranks of LoRA, and a recipe the rest, got "
            f"{', '.join(given)} as well. Leave that out, or plan again."
        )
    plan = BudgetPlan.read(options["plan"])
    if plan.model != str(options["model"]):
        logger.warning("This budget plan was made for %s; it is used for %s.", plan.model, options["model"])
    return plan


def asked_rank(rank: int | None, family: Family | None) -> int:
    """Return the rank that was asked for, or the default of a family.

    Raises:
        ConfigurationError: if a rank is given for a family that has none.
    """
    if rank is not None and family is not None and family.default_rank is None:
        raise ConfigurationError(
            f"The family {family.title} has no rank, got {rank}. Leave out `rank`; the fields of the family "
            "say how large it is."
        )
    return default_scaling(family).rank if rank is None else rank


def asked_distillation(own: Distillation | None, options: Mapping[str, Any]) -> Distillation | None:
    """Return the distillation that was asked for.

    Args:
        own: that of the recipe, if it has one.
        options: every option of `quailora init` by name.

    Raises:
        ConfigurationError: if a setting is out of range, or given where nothing is distilled.
    """
    steps, tokens, rate = (options[name] for name in ("distill", "distill_tokens", "distill_rate"))
    if not steps and own is None and (tokens is not None or rate is not None):
        raise ConfigurationError(
            "Expected steps of a distillation beside its tokens or its learning rate, got none. Pass `distill`."
        )
    if not steps and own is None:
        return None
    return (own or Distillation()).asked(steps, tokens, rate, options["sequence_length"])


@final
@dataclass(frozen=True)
class Asked:
    """The parts of a method that a recipe decides.

    Attributes:
        solver: how the correction is found.
        metric: how much each error of a layer counts.
        inputs: whose inputs layers are fitted to.
    """

    solver: Solver = AlternatingLeastSquares()  # noqa: RUF009 # frozen
    metric: Weighting = GramWeighting()  # noqa: RUF009 # frozen
    inputs: InputsOf = "full"


def asked_method(
    recipe: str | None, quantizer: Quantizer | None, base: str | None, scaling: LoraScaling, asked: Asked
) -> Method:
    """Return the method that options describe.

    Raises:
        ConfigurationError: if options contradict each other, or there is no recipe of this name.
    """
    if base is not None and quantizer is not None:
        raise ConfigurationError(
            "Expected `quantizer` or `base`, got both. A base that is there already has a quantizer."
        )
    chosen, existing = (quantizer or NF4(), None) if base is None else (None, StoredBase(base))
    if recipe is None:
        initializer = Initializer(chosen, asked.solver, scaling.rank, asked.metric)
        return Method(initializer, scaling, asked.inputs, base=existing)
    if asked != Asked():
        raise ConfigurationError("A recipe decides solver, metric and inputs; leave these options out.")
    return replace(find_recipe(recipe).method(chosen, scaling, existing), recipe=resolved_name(recipe))
