"""What training has added to an adapter whose change is linear in its tensors, as an adapter of the same kind."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigurationError, ModelError
from ..families import Family
from .provenance import digest_of, read_provenance
from .saved import SavedAdapter
from .tuned import family_of


def is_plain_lora(saved: SavedAdapter) -> bool:
    """Return whether an adapter is LoRA without magnitudes and biases of its own."""
    config = saved.config
    return config.get("peft_type") == "LORA" and not (config.get("use_dora") or config.get("lora_bias"))


def linear_family(saved: SavedAdapter) -> Family:
    """Return the family of a saved adapter.

    Raises:
        ModelError: if its change is not linear in its tensors, so that no adapter of its kind holds what training adds.
    """
    from peft import PeftConfig

    try:
        family, _ = family_of(PeftConfig.from_pretrained(str(saved.folder)))
    except ConfigurationError as error:
        raise ModelError(f"Expected an adapter of a family that quailora knows in {saved.folder}: {error}") from error
    if not family.linear:
        raise ModelError(
            f"Expected a LoRA adapter in {saved.folder}, or one whose change is linear in its tensors, such as miss, "
            f"shira or c3a, got {family.title}. What training adds to it is no adapter of its kind."
        )
    return family


def linear_change(trained: SavedAdapter, before: SavedAdapter) -> dict[str, Tensor]:
    """Return the tensors of the adapter that adds what training has changed: the differences of the trained ones.

    Raises:
        ConfigurationError: if training did not start from the other adapter, as far as the files tell.
    """
    family = linear_family(before)
    own = adapter_keys(before)
    shapes = [{key: tensor.shape for key, tensor in saved.tensors.items() if key in own} for saved in (trained, before)]
    if shapes[0] != shapes[1]:
        raise ConfigurationError(started_elsewhere(trained.folder, before.folder, "their layers or shapes differ"))
    origin = read_provenance(trained.folder).origin
    digest = digest_of({key: before.tensors[key] for key in own})
    if origin is not None and origin.initial and origin.initial != digest:
        reason = f"it notes that training started from tensors with the hash {origin.initial}, and theirs is {digest}"
        raise ConfigurationError(started_elsewhere(trained.folder, before.folder, reason))
    fixed = tuple(family.untrained)
    for key in own:
        if fixed and key.endswith(fixed) and not torch.equal(trained.tensors[key], before.tensors[key]):
            raise ConfigurationError(started_elsewhere(trained.folder, before.folder, f"{key} differs"))
    trained_keys = [key for key in own if not (fixed and key.endswith(fixed))]
    changed = {key: trained.tensors[key].float() - before.tensors[key].float() for key in trained_keys}
    return dict(trained.tensors) | changed


def adapter_keys(saved: SavedAdapter) -> list[str]:
    """Return the names of the tensors of an adapter, without those of modules that are trained whole."""
    whole = saved.config.get("modules_to_save") or ()
    return [key for key in saved.tensors if not any(f".{name}." in key for name in whole)]


def started_elsewhere(trained: Path, before: Path, reason: str) -> str:
    """Return what to say of an adapter that was not trained from another one."""
    return f"{trained} was not trained from {before}: {reason}. Pass the folder that it started from as `initial`."
