"""Modules that are trained whole beside an adapter, such as embeddings and the head: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import TargetError
from ..models.layers import Layer
from ..models.weights import resident
from .lora import PREFIX


def find_modules(model: Any, names: Sequence[str], layers: Mapping[str, Layer]) -> dict[str, nn.Module]:
    """Return the modules that PEFT will train whole, by their full names.

    Args:
        model: the model, with or without weights.
        names: module names or their endings at a dot, as in PEFT.
        layers: the layers with an adapter, which cannot be trained whole, too.

    Raises:
        TargetError: if a name means no module, one that holds others, or one with an adapter.
    """
    modules: dict[str, nn.Module] = {}
    for given in names:
        # PEFT takes a name for the ending of a path at a dot, and copies the module whole; one that contains others
        # would copy these, too.
        matching = {
            name: module for name, module in model.named_modules() if name == given or name.endswith(f".{given}")
        }
        plain = [name for name, module in model.named_modules() if name and not list(module.children())]
        if not matching:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in plain}))
            raise TargetError(f"The name {given!r} in modules_to_save means no module. Modules end in: {endings}.")
        for name in matching:
            if name in layers:
                raise TargetError(
                    f"{name} is to get an adapter. Leave it out of modules_to_save, or out of the targets."
                )
            if name not in plain:
                raise TargetError(
                    f"Expected single modules in modules_to_save, but {name} holds others. Name "
                    "the modules inside of it."
                )
        modules |= matching
    return modules


def tensors_to_save(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what an adapter file has of these modules: their weights as they are, by the names in the file."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        with resident(module):
            state = {f"{PREFIX}{name}.{key}": tensor for key, tensor in module.state_dict().items()}
            tensors |= {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    return tensors
