"""Merge a trained adapter into a quantized checkpoint that needs no adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ..adapters.change import TrainedChange
from ..adapters.given import AdapterGiven
from ..adapters.lora import LoraScaling
from ..errors import ConfigurationError
from ..evaluation.texts import EvaluationTexts
from ..layer.initializer import Initializer
from ..methods.method import Method
from ..models.limits import fitting_length
from ..models.load import empty_model
from ..models.quantized import quantization_of
from ..pipeline.fine_tuned import FineTuned, Target
from ..pipeline.formats import tensors_in_checkpoints
from ..pipeline.initialize_model import finished_run
from ..pipeline.options import Output, Resources
from ..pipeline.output import AdapterOutput
from ..pipeline.plan import CalibrationGiven, plan_run, source_of
from ..pipeline.report import versions
from ..pipeline.store import weights_of
from ..quantizers import GPTQ, NF4, NF4GPTQ, NF4MSE, Quantizer, Uniform
from ..solvers import Zero
from ..support.files import MODEL_MARK, StrPath, new_folder, write_json
from ..support.machine import within_memory
from ..support.settings import describe
from .card import merged_card
from .certificate import Certificate, certify
from .trained_on import base_trained_on, check_model, model_of
from .training import MergeTraining, check_memory, trained_layers

TEXTS = EvaluationTexts(windows=8)
"""What a merged model is measured on, if nothing else is asked for."""

_WINDOW_LENGTH = 512  # tokens in a window, where the model has as many positions


@final
@dataclass(frozen=True)
class Merged:
    """What `merge` returns.

    Attributes:
        folder: folder of the merged model.
        bits_per_weight: stored bits of its quantized weights, everything counted.
        certificate: how far it is from the unmerged model; None if that was not measured.
    """

    folder: Path
    bits_per_weight: float
    certificate: Certificate | None

    def show(self) -> None:
        """Print the certificate."""
        if self.certificate is not None:
            self.certificate.show()


@within_memory("no training of blocks or scales, fewer or shorter windows, or none (`windows=0`), and `device='cpu'`")
def merge(
    adapter: AdapterGiven,
    into: Quantizer,
    *,
    out: Output | StrPath,
    initial: StrPath | None = None,
    model: StrPath | None = None,
    trained_on: Quantizer | StrPath | None = None,
    target: Target = "trained",
    calibration: CalibrationGiven = None,
    texts: EvaluationTexts = TEXTS,
    max_kl: float | None = None,
    training: MergeTraining = MergeTraining(),  # noqa: B008 # frozen
    resources: Resources = Resources(),  # noqa: B008 # frozen
) -> Merged:
    """Write the trained model as a quantized checkpoint, without an adapter.

    The codes are chosen with error feedback, on the inputs that layers have in the trained model. Then codes and scales
    are trained, block by block, and at last all scales together, so that the predictions come close to those of the
    trained model. Rounding to nearest, as PEFT's `merge_and_unload` does, loses what is smaller than a step of the
    codes.

    Args:
        adapter: hub name or folder of the trained adapter, or the `PeftModel` that was trained.
        into: the format: NF4 or FP4 and Int8 of bitsandbytes, or GPTQ for AutoGPTQ's.
        out: folder for the model, or `Output` for more choices.
        initial: the adapter that the training started from, "zero" if it added nothing; looked for if None.
        model: the full-precision model; by default what the adapter notes.
        trained_on: the quantized base that the adapter was trained on; by default what the adapter notes.
        target: what the merged model comes close to: "trained", the base with the adapter; or "full", the
            full-precision weights with what training has changed, `W + s (B A - B0 A0)`.
        calibration: text or batches of the task, see `initialize_model`.
        texts: what the merged model is measured on beside the unmerged one, in windows of 512 tokens if they say no
            length; without windows it is not measured.
        max_kl: largest divergence from the unmerged model, nats a token, with which the model is written.
        training: of codes and scales, which follows; `MergeTraining.none()` trains nothing.
        resources: device, memory and dtype, see `initialize_model`.

    Raises:
        QualityError: if the divergence is above `max_kl`; nothing is written.
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    output = replace(out if isinstance(out, Output) else Output(out), save_base=True, model=True)
    measured = texts.windows > 0
    if max_kl is not None and not measured:
        raise ConfigurationError("Expected windows to measure the divergence on, got none. Leave `max_kl` out.")
    if not tensors_in_checkpoints(into) and output.base_format != "dequantized":
        raise ConfigurationError(
            f"Expected a format that checkpoints hold, such as NF4() or GPTQ(4), got {into!r}. To write its values in "
            "floating point, pass `base_format='dequantized'`."
        )
    method = merging_method(into)
    change = TrainedChange.read(adapter, initial)
    name = model_of(change, model)
    needed = measured or target == "trained" or change.needs_base
    base = base_trained_on(change, name, trained_on) if needed else None
    check_model(change, model, base)
    fine_tuned = FineTuned((change,), trained_on=base, target=target)
    if measured:
        texts.check()
        empty = empty_model(name, trust_remote_code=resources.trust_remote_code)
        texts = replace(texts, window_length=fitting_length(empty, texts.window_length, _WINDOW_LENGTH))
    plan = plan_run(name, method, source_of(calibration), ["all-linear"], output, resources, fine_tuned=fine_tuned)
    check_memory(plan, training)
    folder = Path(plan.output.folder if plan.output else output.folder)
    # Everything that can fail is done inside the folder that is not there yet: a model that is worse than asked for, or
    # a process that is killed, leaves the state of the run and no model.
    with finished_run(plan) as finished:
        if finished is None:  # in all but the first of several processes
            return Merged(folder, 0.0, None)
        certificate = None
        with new_folder(folder, output.overwrite, model=True) as partial:
            layers, trained = trained_layers(finished, training)
            finished.write_base(partial, output.base_format, layers)
            if measured:
                certificate = certify(fine_tuned, name, weights_of(layers), nearest_of(into), texts, resources)
                certificate.check(max_kl)
            bits = write_notes(partial, finished, change, certificate, into, trained)
    return Merged(folder, bits, certificate)


def merging_method(into: Quantizer) -> Method:
    """Return how the layers of a merged model are quantized: with error feedback, where the format has it."""
    return Method(Initializer(careful_of(into) or into, Zero(), rank=1), LoraScaling(1))


def careful_of(into: Quantizer) -> Quantizer | None:
    """Return the quantizer with error feedback and shrinkage for a format; None where there is none."""
    if isinstance(into, (NF4, NF4MSE)):
        return NF4GPTQ(into.block_size, into.double_quantization)
    if isinstance(into, (Uniform, GPTQ)):
        # Loud columns first, on grids of the least squared error that are fitted beforehand: of all that was tried on
        # layers of SmolLM2 this leaves the least error on other text. Groups of the file stay in the order of columns.
        return GPTQ(into.bits, into.group_size, into.symmetric, activation_order=True, static_groups=True, mse=True)
    return into if isinstance(into, NF4GPTQ) else None


def nearest_of(into: Quantizer) -> Quantizer:
    """Return the quantizer that rounds to the nearest level of the same format."""
    if isinstance(into, (NF4GPTQ, NF4MSE)):
        return NF4(into.block_size, into.double_quantization)
    return Uniform(into.bits, into.group_size, into.symmetric) if isinstance(into, GPTQ) else into


def write_notes(
    folder: Path,
    finished: AdapterOutput,
    change: TrainedChange,
    certificate: Certificate | None,
    into: Quantizer,
    trained: str,
) -> float:
    """Write what was merged and how good it is beside a merged model; return its bits per weight."""
    report = finished.report()
    content: dict[str, Any] = {
        "model": finished.loaded.name,
        "adapter": str(change.trained.folder),
        "change": change.digest,
        "format": describe(into),
        "training": trained,
        "calibration": finished.plan.source.described(),
        "versions": versions(),
        "certificate": None if certificate is None else certificate.as_dict(),
        "layers": {record.name: record.relative_error for record in finished.records},
    }
    write_json(folder / MODEL_MARK, json.loads(json.dumps(content, default=str)))
    card = merged_card(content, certificate, report["bits_per_weight"], quantization_of(str(folder)))
    (folder / "README.md").write_text(card, encoding="utf-8")
    bits: float = report["bits_per_weight"]
    return bits
