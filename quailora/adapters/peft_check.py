"""Ask stock PEFT itself, on a model without weights, which layers an adapter reaches there.

The adapter's own configuration is put into an empty model, and tensors with its names and shapes go through the code
that PEFT loads adapters with. So what this version of PEFT renames, drops, refuses or cannot run is found for every
family before anything is computed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibration.empty_pass import run_empty
from ..errors import ModelError, summary
from ..models.layers import Layer, explicit_targets, kind
from .lora import LoraScaling, expert_stacks, lora_config, lora_shapes


def unusable_layers(model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, *, run: bool) -> dict[str, str]:
    """Return the layers whose factors stock PEFT does not use, each with the reason.

    Args:
        model: the model without weights; it is left as it was.
        layers: the layers that are to get an adapter.
        scaling: ranks and alphas of the adapter.
        run: whether to run the model with the adapter, too; it has to run without one.

    Raises:
        ModelError: if PEFT cannot put in an adapter for these layers together, though it can for each kind of them.
    """
    linear = {name: layer for name, layer in layers.items() if layer.expert is None}
    reasons = _settled(model, layers, scaling, run=run and linear.keys() == layers.keys())
    if run and linear.keys() != layers.keys():  # PEFT's wrapper of a parameter does not run without weights
        kept = {name: layer for name, layer in linear.items() if name not in reasons}
        reasons |= _settled(model, kept, scaling, run=True)
    return {name: reasons[layer.group] for name, layer in layers.items() if layer.group in reasons}


def _settled(model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, *, run: bool) -> dict[str, str]:
    """Return the layers, or fused parameters, to take away until PEFT uses all that is left."""
    # Taking layers away changes the list of targets that PEFT is given, and with it what PEFT does. So the question is
    # asked again until no layer is dropped.
    reasons: dict[str, str] = {}
    while left := {name: layer for name, layer in layers.items() if layer.group not in reasons}:
        try:
            unused = dict.fromkeys(
                dropped(model, left, scaling, run=run), "PEFT drops their factors when it loads them"
            )
        except Exception as error:  # PEFT passes on many kinds, those of transformers and torch among them
            unused = _refused(model, left, scaling, run=run)
            if not unused:
                raise ModelError(f"Stock PEFT cannot load an adapter for these layers ({summary(error)}).") from error
        if not unused:
            break
        reasons |= unused
    return reasons


def _refused(model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, *, run: bool) -> dict[str, str]:
    """Return the layers, or fused parameters, of each kind that PEFT refuses when it is alone, with its own words."""
    reasons: dict[str, str] = {}
    for layer_kind in dict.fromkeys(kind(name) for name in layers):
        members = {name: layer for name, layer in layers.items() if kind(name) == layer_kind}
        try:
            dropped(model, members, scaling, run=run)
        except Exception as error:  # noqa: BLE001 # PEFT passes on many kinds
            reasons |= {layer.group: f"PEFT refuses them ({summary(error)})" for layer in members.values()}
    return reasons


def dropped(model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, *, run: bool) -> set[str]:
    """Return the layers, or fused parameters, whose tensors PEFT does not put where they belong.

    Raises:
        Exception: what PEFT, or the model with its adapter, raises.
        ModelError: if PEFT puts adapters into other layers, too.
    """
    # Each tensor is filled with a number of its own. After PEFT's loading, a parameter that holds the number of its own
    # key has got its tensor; any other has not. Tensors of one entry that is expanded cost no memory.
    stacks = expert_stacks(layers)
    config = lora_config(scaling, target_modules=explicit_targets(model, layers), experts=stacks)
    shapes = lora_shapes(layers, scaling)
    marks = {key: float(number) for number, key in enumerate(shapes, 1)}
    tensors = {key: torch.full((1, 1), marks[key]).expand(shape) for key, (_, shape) in shapes.items()}
    adapted = adapted_copy(model, config)
    loaded = loaded_by_peft(adapted, tensors)
    received = {
        key for key, (_, shape) in shapes.items() if _is_marked(loaded.get(parameter_of(key)), shape, marks[key])
    }
    lost = {group for key, (group, _) in shapes.items() if key not in received}
    if lost:
        return lost
    others = adapter_parameters(adapted) - {parameter_of(key) for key in received}
    if others:
        raise ModelError(f"PEFT would put {len(others)} more tensors into the model, {min(others)} among them.")
    if run:
        run_empty(adapted.get_base_model())
    return set()


def adapted_copy(model: Any, config: Any) -> Any:
    """Return a copy of an empty model with an adapter as PEFT puts it in."""
    from peft import get_peft_model

    with warnings.catch_warnings(action="ignore"):  # on fan_in_fan_out, which PEFT sets right
        return get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)


def loaded_by_peft(adapted: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what PEFT's own loading makes of the tensors of a file: by parameter of the model, the parameters only."""
    from peft import set_peft_model_state_dict

    seen: dict[str, Tensor] = {}
    hook = adapted.register_load_state_dict_pre_hook(lambda _, state, *__: seen.update(state))
    try:
        with warnings.catch_warnings(action="ignore"):  # on tensors that go into a model without data
            set_peft_model_state_dict(adapted, dict(tensors))
    finally:
        hook.remove()
    known = adapter_parameters(adapted)
    return {name: tensor for name, tensor in seen.items() if name in known}


def adapter_parameters(adapted: Any) -> set[str]:
    """Return the names of the factors in a model that PEFT has changed."""
    return {name for name, _ in adapted.named_parameters() if ".lora_" in name}


def parameter_of(key: str) -> str:
    """Return the parameter of a model that PEFT has changed, for the name of a tensor in an adapter file."""
    module, _, name = key.rpartition(".")
    return f"{module}.default.{name}"


def _is_marked(tensor: Tensor | None, shape: tuple[int, int], mark: float) -> bool:
    return tensor is not None and tensor.shape == shape and tensor[0, 0].item() == mark
