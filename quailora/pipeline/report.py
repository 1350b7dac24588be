"""`report.json`: what was run, on what, and four errors for each layer."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

from ..layer.record import LayerRecord, error_reduction

_PACKAGES = ("quailora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")


_version = cache(version)  # which reads files


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}


def versions_in_words() -> str:
    """Return the same as one line."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def build_report(
    settings: Mapping[str, Any],
    phases: Mapping[str, Any],
    layers: Sequence[LayerRecord],
    bits_per_weight: float,
    calibration_tokens: int,
    block_seconds: Mapping[int, float],
) -> dict[str, Any]:
    """Return the content of `report.json`.

    Args:
        settings: what was asked for.
        phases: time and memory of each phase.
        layers: entries of the layers with a correction.
        bits_per_weight: stored bits of the quantized layers, and of those that a plan keeps in 16 bits, together.
        calibration_tokens: number of calibration tokens.
        block_seconds: time that each block took.
    """
    # Everything that is needed to read the numbers without the run: what was asked for, what computed it, and how long
    # it took.
    return {
        "model": settings["model"],
        "settings": dict(settings),
        "versions": versions(),
        "phases": dict(phases),
        "block_seconds": dict(block_seconds),
        "calibration_tokens": calibration_tokens,
        "bits_per_weight": bits_per_weight,
        "mean_error_share": error_reduction(layers),
        "layers": [asdict(layer) for layer in layers],
    }


def error_summary(report: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """Return the title, the header and the rows of a table of the errors of layers, as the mean over them.

    Args:
        report: content of `report.json`.
    """
    share = report["mean_error_share"]
    lora = report["settings"].get("family") is None
    trained = report["training"] or report["blocks"]
    rows = [
        ["quantized, no correction", "100.00 %"],
        ["uncalibrated SVD" if lora else "the same family, uncalibrated", f"{share['error_uncalibrated']:.2%}"],
        ["this adapter before its training" if trained else "this adapter", f"{share['error']:.2%}"],
    ]
    if lora:
        rows.append(["optimum of this rank (a lower bound in wide layers)", f"{share['error_optimal']:.2%}"])
    layers, bits = len(report["layers"]), report["bits_per_weight"]
    title = f"an adapter for {layers} layers, on a base of {bits:.2f} bits per weight"
    return title, ("output error, mean over layers", "share of the error without correction"), rows
