"""Names in a checkpoint and in the model that transformers makes of it, which may differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def names_in(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """Return the name in the model of each tensor of a checkpoint, by transformers' own rules.

    The name is None where transformers merges, splits or transposes tensors while it loads them.

    Args:
        model: the model, with or without weights.
        keys: names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    weights, renamed = model.state_dict(), {}
    for key in keys:
        new, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
        renamed[key] = new if converted is None else None
    return renamed
