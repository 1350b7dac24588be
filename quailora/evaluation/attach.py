"""Attach a saved adapter to a model by stock PEFT, as a whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, summary

_SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B")  # ends of names


def with_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Return a model with an adapter, loaded by stock PEFT.

    Raises:
        ModelError: if PEFT does not load it, or only a part of it, which is taken off again.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # what is missing is an error below
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT passes on errors of safetensors, json and torch
        raise ModelError(f"PEFT cannot load the adapter {folder} on this model ({summary(error)}).") from error
    partly = loaded_partly(wrapped, folder)
    if partly:
        with suppress(ValueError):  # of IA3, which PEFT does not take off layers of 4 bits
            wrapped.unload()
        raise ModelError(
            f"PEFT loads only a part of the adapter {folder} on this model: {partly}. Its configuration and its "
            "tensors do not belong together, or it is the adapter of another model."
        )
    return wrapped


@contextmanager
def adapted(model: Any, folder: Path) -> Iterator[Any]:
    """Attach an adapter inside a `with` statement, and take it off at the end; see `with_adapter`."""
    wrapped = with_adapter(model, folder, trainable=False)
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()


def loaded_partly(wrapped: Any, adapter: Path) -> str:
    """Return which tensors of an adapter PEFT has not loaded, or has made itself; an empty text if there are none."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return ""
    mark = getattr(wrapped.base_model, "prefix", "lora_")  # which PEFT gives the tensors of a family
    with safe_open(file, "pt") as content:
        present = {key for key in content.keys() if mark in key}  # noqa: SIM118 # no mapping
    loaded = {key for key in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if mark in key}
    # PEFT draws again what all layers share, from a seed, where it is not in the file.
    loaded = {key for key in loaded if key in present or not key.endswith(_SHARED)}
    ignored, invented = sorted(present - loaded), sorted(loaded - present)
    parts = []
    if ignored:
        parts.append(f"{len(ignored)} of its {len(present)} tensors are ignored, {ignored[0]} first")
    if invented:
        parts.append(f"{len(invented)} that the configuration asks for are missing, {invented[0]} first")
    return "; ".join(parts)
