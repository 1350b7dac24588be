"""The plan of a run, which is made and checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ..adapters.hub import check_upload
from ..adapters.lora import LoraScaling
from ..adapters.modules import find_modules
from ..bases import ExistingBase, StoredBase
from ..calibration.sources import BatchCalibration, CalibrationSource, TextCalibration
from ..calibration.text import TextSource
from ..calibration.windows import Calibration
from ..errors import ConfigurationError, DoesNotFitError
from ..families import Family, find_family
from ..methods.method import Method
from ..methods.recipes import Recipe, find_recipe, resolved_name
from ..models.layers import linear_layers
from ..models.limits import fitting_length
from ..models.load import empty_copy, empty_model, resolve_device
from ..quantizers import NF4, Quantizer
from ..support.choices import BaseFormat, Offload
from ..support.files import StrPath
from ..support.machine import memory_available, size
from .checks import (
    check_awq,
    check_factors_dtype,
    check_frozen_rank,
    check_gradients,
    check_layers,
    check_layout,
    check_seed,
    output_folder,
    warn_of_blocks,
    warn_of_shipped_text,
    warn_of_training,
)
from .estimate import Estimate, estimate
from .fine_tuned import FineTuned
from .formats import check_single_layers, examples_of_base
from .options import Output, Resources
from .targets import AdapterPlan, plan_adapter

CalibrationGiven = CalibrationSource | Calibration | StrPath | Iterable[Mapping[str, Any]] | None
"""What callers may calibrate on: a text by file or name, windows of it, batches of tokens; the shipped text if None."""

BaseGiven = Quantizer | ExistingBase | StrPath
"""What callers may name as base: a quantizer that makes it, or a quantized checkpoint by hub name or folder."""


@final
@dataclass(frozen=True, eq=False)
class RunPlan:
    """The plan of a run.

    Attributes:
        model: a model in memory, or its hub name, folder or file as it was asked for.
        empty: the model without weights.
        method: how layers are initialized, with the ranks that they can carry.
        adapter: which layers get a correction.
        source: where the calibration tokens come from.
        targets: the targets that were asked for.
        output: the folder to write to and what is written; None for a result in memory.
        resources: what of the machine the run may use.
        estimate: memory and time that the run will take.
        fine_tuned: what trainings have changed in the model, which is added to its weights; None for the model itself.
    """

    model: Any
    empty: Any
    method: Method
    adapter: AdapterPlan
    source: CalibrationSource
    targets: tuple[str, ...]
    output: Output | None
    resources: Resources
    estimate: Estimate
    fine_tuned: FineTuned | None = None

    @property
    def save_base(self) -> bool:
        """Whether the base is written, too: because that was asked for, or because the method chooses it."""
        return self.method.changes_base or (self.output is not None and self.output.save_base)

    @property
    def on_disk(self) -> bool:
        """Whether the weights stay on disk.

        Raises:
            DoesNotFitError: if the run stays above the limit of memory that was asked for.
            ConfigurationError: if the method takes gradients of the whole model, and its weights would stay on disk.
        """
        if not isinstance(self.model, str):
            return False
        on_disk = choose_offload(self.resources.offload, self.resources.memory_limit, self.estimate)
        check_gradients(self.method, self.adapter.layers, on_disk)
        return on_disk


def plan_run(
    model: Any,
    method: Method,
    source: CalibrationSource,
    targets: Sequence[str],
    output: Output | None,
    resources: Resources,
    *,
    wrapped: bool = False,
    fine_tuned: FineTuned | None = None,
) -> RunPlan:
    """Return the plan of a run; only configurations and shapes are read.

    Args:
        model: a transformers causal language model in full precision, or its hub name, folder, `.gguf` file, or "demo".
        method: how layers are initialized.
        source: what to calibrate on.
        targets: names or kinds of layers; see `select_layers`.
        output: what to write; None for a result in memory.
        resources: what may be used.
        wrapped: whether PEFT has put an adapter into these layers already, so that it need not be asked whether it can.
        fine_tuned: what trainings have changed in the model.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    model = str(model) if isinstance(model, Path) else model
    if output is not None:
        read = (model, method.base and method.base.checkpoint, *(fine_tuned.folders if fine_tuned else ()))
        place = output_folder(output.folder, overwrite=output.overwrite, model=output.model, inputs=read)
        output = replace(output, folder=place)
    # The cheap checks come first. Then the model runs without its weights, which are not read at all.
    device = resolve_device(resources.device)
    source.check()
    check_seed(source.seed)
    method.check()
    save_base = method.changes_base or (output is not None and output.save_base)
    if isinstance(model, str):
        empty = empty_model(model, resources.dtype, device=device, trust_remote_code=resources.trust_remote_code)
    else:
        empty = empty_copy(model)
    if fine_tuned is not None:
        fine_tuned.check(empty)
    check_single_layers(method, linear_layers(empty))
    adapter = plan_adapter(
        empty,
        targets,
        method.scaling,
        method.base,
        family=method.family,
        stock=not save_base,
        wrapped=wrapped,
        kept=method.kept,
    )
    source = fitted_to(source, empty)
    distillation = method.distillation and method.distillation.fitted(source.size[1])
    method = replace(method, scaling=adapter.scaling, distillation=distillation)
    check_frozen_rank(method, adapter.layers)
    check_layers(adapter.layers, method, source, save_base)
    if output is not None:
        check_written_base(method, adapter, output.base_format if save_base else None)
        check_factors_dtype(method.family, output.factors_dtype)
        find_modules(empty, output.modules_to_save, adapter.layers)
    needed = estimate(
        title_of(model),
        empty,
        adapter,
        method,
        source,
        save_base=save_base,
        device=device,
        available=memory_available(resources.memory_limit, device),
        number_bytes=2 if output is not None and output.factors_dtype == "bfloat16" else 4,
    )
    return RunPlan(model, empty, method, adapter, source, tuple(targets), output, resources, needed, fine_tuned)


def check_written_base(method: Method, adapter: AdapterPlan, base_format: BaseFormat | None) -> None:
    """Raise a `ConfigurationError` unless stock PEFT computes the adapter on the base that it will be loaded on.

    Args:
        method: how layers are initialized.
        adapter: the layers.
        base_format: format in which the base is written; None if it is not written.
    """
    if base_format == "dequantized":
        check_layout(method.family, "float")
        return
    for stored in examples_of_base(method, adapter.layers):
        if base_format == "awq":
            check_awq(adapter.layers, method, stored)
        check_layout(method.family, stored.layout)
        warn_of_blocks(adapter.layers, stored)


def choose_offload(asked: Offload, limit: str | None, needed: Estimate) -> bool:
    """Return whether to leave the weights on disk.

    Raises:
        DoesNotFitError: if a limit was given, and the run stays above it in the way asked for.
    """
    on_disk = asked == "always" or (asked == "auto" and needed.in_memory > needed.available)
    peak = needed.streamed if on_disk else needed.in_memory
    if limit is not None and peak > needed.available:
        hint = "" if on_disk else ", or leave the weights on disk with `offload='auto'`"
        raise DoesNotFitError(
            f"Expected to stay below {size(needed.available)}, but the run needs about {size(peak)} of {needed.memory}"
            f"{' with the weights left on disk' if on_disk else ''}. Raise the limit, or use fewer targets "
            f"or shorter samples{hint}."
        )
    return on_disk


def check_plan(plan: RunPlan) -> None:
    """Check just before a run begins that the hub takes an upload; warn of a calibration text that is too little."""
    if plan.output is not None:
        check_upload(plan.output.push_to_hub)
    warn_of_shipped_text(plan.source)
    warn_of_training(plan.method, plan.source, next(iter(plan.adapter.layers.values())))


def title_of(model: Any) -> str:
    """Return the name of a model in messages: the one that the caller gave, or that it was loaded from."""
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or type(model).__name__)


def fitted_to(source: CalibrationSource, empty: Any) -> CalibrationSource:
    """Return a source whose windows fit the model: as long as asked for, or the default, cut to the model's positions.

    Raises:
        ModelError: if the model has no positions for sequences of this length.
    """
    if isinstance(source, TextCalibration):
        length = fitting_length(empty, source.calibration.sequence_length, source.calibration.length)
        return TextCalibration(replace(source.calibration, sequence_length=length))
    fitting_length(empty, source.size[1], source.size[1])
    return source


def source_of(given: CalibrationGiven, usual: Calibration = Calibration()) -> CalibrationSource:  # noqa: B008 # frozen
    """Return what callers pass as calibration as a source of tokens.

    Args:
        given: what they pass.
        usual: windows that are taken of a text.

    Raises:
        CalibrationError: if batches have no tokens, or are of another form.
    """
    if given is None or isinstance(given, StrPath):
        given = replace(usual, text=TextSource(None if given is None else str(given)))
    if isinstance(given, Calibration):
        return TextCalibration(given)
    return given if isinstance(given, CalibrationSource) else BatchCalibration.of(given)


def method_of(
    method: Method | Recipe | str,
    scaling: LoraScaling | None,
    base: BaseGiven | None,
    family: Family | str | None = None,
) -> Method:
    """Return the method that callers describe.

    Args:
        method: a method, a recipe, or the name of one.
        scaling: ranks and alphas for a recipe; rank 16 if None, or PEFT's default of the family.
        base: base for a recipe; NF4 if None.
        family: kind of adapter for a recipe; LoRA if None.

    Raises:
        ConfigurationError: if a scaling or a base is given beside a `Method`, which has its own, or there is no recipe
            of this name.
    """
    if isinstance(method, Method):
        if scaling is not None or base is not None or family is not None:
            raise ConfigurationError(
                "A Method has a scaling, a base and a family of its own. Leave out scaling, base and family."
            )
        return method
    chosen = find_family(family)() if isinstance(family, str) else family
    recipe = find_recipe(method) if isinstance(method, str) else method
    quantizer, existing = base_of(base)
    made = recipe.method(quantizer, scaling or default_scaling(chosen), existing)
    made = replace(made, initializer=replace(made.initializer, family=chosen))
    return replace(made, recipe=resolved_name(method)) if isinstance(method, str) else made


def default_scaling(family: Family | None) -> LoraScaling:
    """Return the ranks of an adapter for which none were asked: PEFT's default of the family, 16 for LoRA."""
    return LoraScaling((None if family is None else family.default_rank) or LoraScaling().rank)


def base_of(given: BaseGiven | None) -> tuple[Quantizer | None, ExistingBase | None]:
    """Return the quantizer that makes the base and None, or None and the base if it exists already."""
    if given is None or isinstance(given, Quantizer):
        return given or NF4(), None
    return None, given if isinstance(given, ExistingBase) else StoredBase(str(given))
