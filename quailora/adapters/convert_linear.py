"""What training has added to an adapter whose change is linear in its tensors, as an adapter of the same kind."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigurationError, ModelError
from ..families import Family
from .pairs import adapter_keys, check_trained_from
from .saved import VARIANTS, SavedAdapter
from .tuned import family_of


def is_plain_lora(saved: SavedAdapter) -> bool:
    """Return whether an adapter is LoRA without magnitudes and biases of its own, which acts on every token."""
    others = any(saved.config.get(name) for name in ("use_dora", "lora_bias", *VARIANTS))
    return saved.config.get("peft_type") == "LORA" and not others


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
    check_trained_from(family, trained, before)
    own, fixed = adapter_keys(before), tuple(family.untrained)
    trained_keys = [key for key in own if not (fixed and key.endswith(fixed))]
    changed = {key: trained.tensors[key].float() - before.tensors[key].float() for key in trained_keys}
    return dict(trained.tensors) | changed
