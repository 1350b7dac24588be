"""Adapters as callers give them: by hub name, by folder, or in the `PeftModel` that has been trained."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from ..errors import ArgumentTypeError
from ..support.files import StrPath
from .hub import adapter_folder

AdapterGiven = StrPath | Any
"""A hub name, a folder, or a `PeftModel` with the adapter "default"."""

_ADAPTER = "default"


def given_folder(adapter: AdapterGiven) -> Path:
    """Return the folder of an adapter; that of a model in memory is a temporary one, which goes with the model.

    Raises:
        ArgumentTypeError: if it is something else, or the model has no adapter of this name.
        ModelError: if the hub does not give it.
    """
    if isinstance(adapter, StrPath):
        return adapter_folder(adapter)
    from peft import PeftModel

    if not isinstance(adapter, PeftModel) or _ADAPTER not in adapter.peft_config:
        raise ArgumentTypeError(
            f"Expected a hub name, a folder or a PeftModel with the adapter {_ADAPTER!r}, got {type(adapter).__name__}."
        )
    # Saved as training would save it, so that all that follows reads the same files, whoever has written them.
    # The folder is the model's own, and goes with it.
    folder = Path(tempfile.mkdtemp(prefix="quailora-adapter-"))
    weakref.finalize(adapter, shutil.rmtree, folder, ignore_errors=True)
    adapter.save_pretrained(str(folder), selected_adapters=[_ADAPTER])
    return folder
