"""The linear layers of a Hugging Face model: which there are, which are meant, and their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ModelError, TargetError

ALL_LINEAR = "all-linear"


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Return every linear layer but the output head, by module name, in the order of the model.

    These are the layers that bitsandbytes quantizes by default and that PEFT's `all-linear` means: `torch.nn.Linear`
    and GPT-2's `Conv1D`.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def select_layers(model: Any, targets: Sequence[str] = (ALL_LINEAR,)) -> dict[str, nn.Module]:
    """Return the layers that carry an adapter.

    Args:
        model: the model.
        targets: `all-linear`, or module names, their endings (`q_proj`, `mlp.down_proj`) or regular expressions that
            match a whole name; a layer is meant if any of them matches.

    Raises:
        TargetError: if a target matches no linear layer.
    """
    layers = linear_layers(model)
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = {name for name in layers if target == ALL_LINEAR or matches_target(name, target)}
        if not matches:
            endings = ", ".join(sorted({ending(name) for name in layers}))
            raise TargetError(f"The target {target!r} matches no linear layer. Layers of this model end in: {endings}.")
        chosen |= matches
    return {name: module for name, module in layers.items() if name in chosen}


def matches_target(name: str, target: str) -> bool:
    """Return whether a target is the name, its ending at a dot, or a regular expression for the whole name."""
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise TargetError(
            f"The target {target!r} is neither a module name nor a regular expression: {error}."
        ) from error


def explicit_targets(model: Any, chosen: Mapping[str, nn.Module]) -> list[str]:
    """Return the shortest list of PEFT `target_modules` that means exactly these layers.

    That is their endings, if no other module of the model shares one; their full names otherwise.
    """
    endings = {ending(name) for name in chosen}
    every = dict(model.named_modules())
    meant = {name for name in every if ending(name) in endings}
    return sorted(endings) if meant == set(chosen) else list(chosen)


def ending(name: str) -> str:
    """Return the last part of a module name."""
    return name.rpartition(".")[2]


def weight_of(name: str, module: nn.Module) -> Float[Tensor, "out_features in_features"]:
    """Return the weight of a layer as (out_features, in_features); for `Conv1D` a transposed view.

    Raises:
        ModelError: if the weight is not a floating-point matrix.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(
            f"Expected a floating-point weight in {name}, got {getattr(weight, 'dtype', type(weight))}. "
            "Load the model in full precision; quailora quantizes it."
        )
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
