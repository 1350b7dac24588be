"""Names of modules in a checkpoint and in the model that transformers makes of it, which may differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def module_names(checkpoint: str, modules: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of each module of a checkpoint, by transformers' own rules.

    A module whose weight transformers merges, splits or turns while it loads keeps its name, since the model has no
    module that holds the same weight. So does every module of a model whose class transformers does not have.

    Args:
        checkpoint: hub name or folder; only its configuration is read.
        modules: their names in the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return {name: name for name in modules}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    weights, found = model.state_dict(), {}
    for name in modules:
        new, converted = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, weights)
        found[name] = new.removesuffix(".weight") if converted is None else name
    return found
