"""Hashes of everything that a result depends on, which two runs can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bases import ExistingBase
from ..calibration.tokens import CalibrationTokens
from ..models.checkpoint import checkpoint_files
from ..models.load import LoadedModel
from ..models.locate import resolve
from ..models.weights import execution_device

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint(
    settings: Mapping[str, Any], loaded: LoadedModel, tokens: CalibrationTokens, base: ExistingBase | None = None
) -> dict[str, str]:
    """Return what the layers of a run depend on, item by item.

    Args:
        settings: everything that was asked for and can change a layer.
        loaded: the model.
        tokens: the calibration tokens.
        base: the base that layers are read from, if it is quantized already.
    """
    items = {name: json.dumps(value) for name, value in settings.items()}
    return {
        **items,
        "version of quailora": version("quailora"),
        "computing device": execution_device(loaded.model).type,
        "weights": weights_of(loaded.name),
        "configuration of the model": configuration_of(loaded),
        "calibration tokens": tokens.digest,
        **weights_of_base(base),
    }


def weights_of_base(base: ExistingBase | None) -> dict[str, str]:
    """Return the entry for the files of a base that is quantized already; no entry for any other base."""
    if base is None or base.checkpoint is None:
        return {}
    return {"weights of the base": weights_of(resolve(base.checkpoint))}


def configuration_of(loaded: LoadedModel) -> str:
    """Return a short hash of a model's configuration, wherever the model lies."""
    content = loaded.model.config.to_dict()
    kept = {key: value for key, value in content.items() if key not in {"_name_or_path", "transformers_version"}}
    return digest([json.dumps(kept, sort_keys=True, default=str)])


def weights_of(name: str) -> str:
    """Return a short hash of the files of a checkpoint, by size, header and samples of their content.

    Args:
        name: hub name or folder.
    """
    # Reading all weights would take minutes for a large model. Size, header and 64 samples of each file find another
    # model, another training and most damage; transformers finds a file that is cut off.
    hashed = hashlib.sha256()
    for file in checkpoint_files(name):
        hashed.update(f"{file.name} {file.stat().st_size} ".encode())
        for part in samples_of(file):
            hashed.update(part)
    return hashed.hexdigest()[:16]


def digest(content: Tensor | Sequence[str]) -> str:
    """Return a short hash of tokens or names."""
    data = content.numpy().tobytes() if isinstance(content, Tensor) else json.dumps(list(content)).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def samples_of(file: Path) -> list[bytes]:
    """Return short pieces of a file, from its start to its end."""
    size = file.stat().st_size
    with file.open("rb") as content:
        parts = []
        for index in range(_SAMPLES):
            content.seek(index * max(0, size - _SAMPLE_BYTES) // max(1, _SAMPLES - 1))
            parts.append(content.read(_SAMPLE_BYTES))
    return parts
