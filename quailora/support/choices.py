"""What the options of a run may be. Nothing heavy is imported here, so that the command line's help appears at once."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

StrPath = str | Path
"""A path, or the name of something on the hub, as callers give it."""

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
"""In which a model is loaded; "auto" keeps the dtype of the checkpoint."""

DeviceName = Literal["auto", "cpu", "cuda"]
"""What computes; "auto" is the GPU where there is one."""

InputsOf = Literal["full", "quantized", "asymmetric"]
"""Which network's inputs layers are fitted to; see `Walk`."""

CalibrationDtype = Literal["auto", "model", "bfloat16"]
"""Arithmetic of the calibration pass; see `Calibration`."""

BosPlacement = Literal["every-window", "stream"]
"""Where the tokens go that a tokenizer puts in front of a text, such as BOS; see `Calibration`."""

Offload = Literal["auto", "always", "never"]
"""Whether weights stay on disk."""

FactorsDtype = Literal["float32", "bfloat16"]
"""In which an adapter is stored; PEFT makes float32 of it when it loads it."""

BaseFormat = Literal["auto", "awq", "dequantized"]
"""How a quantized base is written; see `Output`."""

PLANNED_BITS = (2, 3, 4, 8, 16)
"""Bits that `quailora plan` chooses from where none are asked for."""

PLANNED_RANKS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Ranks, likewise. One search finds the adapters of all of them."""

PLANNED_GROUP_SIZES = (64, 32)
"""Columns that share a scale in layers of 4 bits, likewise."""

PLANNED_SAMPLES, PLANNED_LENGTH = 64, 512
"""Calibration windows of a plan and tokens in each, likewise."""


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """Return a question with the name that is most like a given one, to be put after a message; nothing if none is."""
    near = get_close_matches(given, list(names), 1)
    return f" Did you mean {near[0]}?" if near else ""
