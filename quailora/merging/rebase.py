"""Move a trained adapter onto another quantized base, in closed form and without training."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from ..adapters.change import TrainedChange
from ..adapters.given import AdapterGiven
from ..adapters.lora import LoraScaling
from ..bases import ExistingBase
from ..bases.fresh import FreshBase, MadeBase
from ..errors import ConfigurationError, ModelError
from ..layer.initializer import Initializer
from ..methods.method import Method
from ..methods.recipes import Recipe, find_recipe
from ..models.layers import all_layers, linear_layers
from ..models.load import empty_model, resolve_device
from ..models.locate import resolve
from ..pipeline.fine_tuned import FineTuned
from ..pipeline.fingerprint import digest, weights_of
from ..pipeline.initialize_model import carry_out
from ..pipeline.options import Output, Resources
from ..pipeline.plan import BaseGiven, CalibrationGiven, method_of, plan_run, source_of
from ..quantizers import NF4, Quantizer
from ..solvers import Zero
from ..support import distributed
from ..support.choices import BaseFormat
from ..support.files import StrPath, folder_of
from ..support.settings import describe
from ..support.tables import print_table
from .trained_on import base_at, base_trained_on, check_model, model_of

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class Rebased:
    """What `rebase` returns.

    Attributes:
        folder: folder of the adapter for the other base.
        report: content of its `report.json`; None in all but the first of several processes.
    """

    folder: Path
    report: Mapping[str, Any] | None = field(repr=False)  # with a line for each layer

    def show(self) -> None:
        """Print a summary of the errors of layers."""
        if self.report is None:
            return
        share = self.report["mean_error_share"]
        rows = [["the other base alone", "100.00 %"], ["with this adapter", f"{share['error']:.2%}"]]
        layers, bits = len(self.report["layers"]), self.report["bits_per_weight"]
        title = f"{self.folder}: {layers} layers, {bits:.2f} bits per weight"
        print_table(title, ("distance to the trained model, mean over layers", "share"), rows)


def rebase(
    adapter: AdapterGiven,
    *,
    out: Output | StrPath,
    initial: StrPath | None = None,
    base: BaseGiven | None = None,
    model: StrPath | None = None,
    rank: int | None = None,
    recipe: Recipe | str = "best",
    calibration: CalibrationGiven = None,
    trained_on: Quantizer | StrPath | None = None,
    resources: Resources = Resources(),  # noqa: B008 # frozen
) -> Rebased:
    """Write an adapter that does on another base what a trained adapter does on the base that it was trained on.

    With `Q'` the other base, each layer gets a correction of rank `r` that brings `Q' + C` close to the full-precision
    weight with what training has changed, `W + s (B A - B0 A0)`. The change and the compensation of the other base
    share the rank. Nothing is trained.

    Args:
        adapter: hub name or folder of the trained adapter, or the `PeftModel` that was trained.
        out: folder for the adapter, or `Output` for more choices. A base that stock transformers does not make while it
            loads a model is written to the folder `base` in it.
        initial: the adapter that the training started from, "zero" if it added nothing; looked for if None.
        base: the other base: a quantized checkpoint by hub name or folder, or a quantizer that makes it of the
            full-precision model; NF4 if None.
        model: the full-precision model; by default what the adapter notes.
        rank: rank of the adapter; that of the trained one if None. Twice the rank has room for both changes.
        recipe: how corrections are found; one that keeps the base.
        calibration: text or batches of the task, see `initialize_model`.
        trained_on: the base that the adapter was trained on, for families whose change depends on it, such as DoRA; by
            default what the adapter notes.
        resources: device, memory and dtype, see `initialize_model`.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    output = out if isinstance(out, Output) else Output(out)
    change = TrainedChange.read(adapter, initial)
    name = model_of(change, model)
    before = base_trained_on(change, name, trained_on) if change.needs_base else None
    check_model(change, model, before)
    source = source_of(calibration)
    if (find_recipe(recipe) if isinstance(recipe, str) else recipe).changes_base:
        raise ConfigurationError(
            f"The recipe {recipe!r} chooses a base of its own, and rebase moves an adapter onto a given one. Take "
            "another recipe, such as best."
        )
    # The layers that the adapter is in are named one by one, so that one which the other base does not have is refused
    # and not left out: the change in it would be lost.
    empty = empty_model(name, trust_remote_code=resources.trust_remote_code)
    layers = change.layers(all_layers(empty))
    targets = sorted({layer.group for layer in layers.values()})
    whole = tuple(sorted({key.rpartition(".")[0] for key in change.modules}))
    output = replace(output, modules_to_save=whole)
    if isinstance(base, Quantizer):  # whose base may take minutes
        check_layers(change, layers, linear_layers(empty), repr(base))
    # There may be two runs, in one group of processes: one that leaves its group must not join another.
    with distributed.process_group(resolve_device(resources.device)):
        chosen, output, staged = other_base(base, name, source, output, resources)
        check_layers(change, layers, chosen.layers, chosen.title)
        family = None if change.family.name == "lora" else change.family
        wanted = method_of(recipe, scaling_of(change, rank), chosen, family)
        fine_tuned = FineTuned((change,), trained_on=before)
        plan = plan_run(name, wanted, source, targets, output, resources, fine_tuned=fine_tuned)
        result = carry_out(plan)
        if staged is not None and distributed.rank() == 0:
            shutil.rmtree(staged, ignore_errors=True)
    return Rebased(Path(plan.output.folder if plan.output else output.folder), result.report)


def check_layers(change: TrainedChange, layers: Collection[str], quantized: Collection[str], title: str) -> None:
    """Raise a `ModelError` if the adapter changes layers that a base has in full precision.

    Args:
        change: the change of the training.
        layers: the layers that it changes.
        quantized: the quantized layers of the base.
        title: what the base is called.
    """
    missing = sorted(set(layers).difference(quantized))
    if missing:
        raise ModelError(
            f"{change.trained.folder} changes {len(missing)} of {len(layers)} layers that are not quantized in "
            f"{title}, {missing[0]} among them, and an adapter is moved onto quantized layers only. Choose a base "
            "that quantizes them, or merge the adapter."
        )


def scaling_of(change: TrainedChange, rank: int | None) -> LoraScaling:
    """Return the ranks and alphas of the adapter for the other base: those of the trained one, or one rank for all."""
    # The factor that PEFT multiplies the product with stays the same, so that learning rates keep their meaning.
    own = change.scaling
    if rank is None or rank == own.rank:
        return own
    scale = change.family.scale(own.default_alpha, own.rank, rslora=own.rslora)
    return LoraScaling(rank, own.alpha_for(rank, scale) if change.family.scales else None, own.rslora)


def other_base(
    given: BaseGiven | None, model: str, source: Any, output: Output, resources: Resources
) -> tuple[ExistingBase, Output, Path | None]:
    """Return the base that an adapter moves to, what is written then, and the folder of a base that was made first.

    A quantizer makes its base of the full-precision model, not of the trained one, so that several adapters share it.
    """
    if isinstance(given, ExistingBase):
        return given, output, None
    if given is not None and not isinstance(given, Quantizer):
        return base_at(given), output, None
    quantizer = given or NF4()
    written = replace(output, save_base=output.save_base or quantizer.stock_config() is None)
    if not quantizer.needs_calibration:
        return FreshBase(model, quantizer, resources.trust_remote_code), written, None
    # A base that was calibrated is made in a run of its own on the full-precision model. The folder is named by all
    # that it depends on, so that a killed run finds it again and another one makes its own.
    target = folder_of(output.folder)
    made_of = [json.dumps(describe(quantizer)), weights_of(resolve(model)), json.dumps(source.described(), default=str)]
    staged = target.with_name(f".{target.name}.base-{digest([*made_of, resources.dtype])}")
    if output.fresh:
        shutil.rmtree(staged, ignore_errors=True)
    if not (staged / "adapter_config.json").is_file():
        logger.info("First the base is made of the full-precision model by %r.", quantizer)
        alone = Method(Initializer(quantizer, Zero(), rank=1), LoraScaling(1))
        # In a format that keeps its codes. What AutoAWQ's cannot hold is refused here, before minutes are spent.
        kept: BaseFormat = "awq" if output.base_format == "awq" else "auto"
        made = Output(staged, save_base=True, base_format=kept)
        plan = plan_run(model, alone, source, ["all-linear"], made, resources)
        carry_out(plan)
    return MadeBase(base_at(staged / "base"), quantizer), written, staged
