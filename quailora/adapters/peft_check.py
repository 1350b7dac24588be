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
from ..families import Family
from ..models.layers import Layer, explicit_targets, kind
from .files import adapter_config, adapter_shapes
from .lora import LoraScaling, expert_stacks


def unusable_layers(
    model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, family: Family, *, run: bool
) -> dict[str, str]:
    """Return the layers whose factors stock PEFT does not use, each with the reason.

    Args:
        model: the model without weights; it is left as it was.
        layers: the layers that are to get an adapter.
        scaling: ranks and alphas of the adapter.
        family: the kind of adapter.
        run: whether to run the model with the adapter, too; it has to run without one.

    Raises:
        ModelError: if PEFT cannot put in an adapter for these layers together, though it can for each kind of them.
    """
    linear = {name: layer for name, layer in layers.items() if layer.expert is None}
    reasons = _settled(model, layers, scaling, family, run=run and linear.keys() == layers.keys())
    if run and linear.keys() != layers.keys():  # PEFT's wrapper of a parameter does not run without weights
        kept = {name: layer for name, layer in linear.items() if name not in reasons}
        reasons |= _settled(model, kept, scaling, family, run=True)
    return {name: reasons[layer.group] for name, layer in layers.items() if layer.group in reasons}


def _settled(
    model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, family: Family, *, run: bool
) -> dict[str, str]:
    """Return the layers, or fused parameters, to take away until PEFT uses all that is left."""
    # Taking layers away changes the list of targets that PEFT is given, and with it what PEFT does. So the question is
    # asked again until no layer is dropped.
    reasons: dict[str, str] = {}
    while left := {name: layer for name, layer in layers.items() if layer.group not in reasons}:
        try:
            unused = dict.fromkeys(
                dropped(model, left, scaling, family, run=run), "PEFT drops their factors when it loads them"
            )
        except Exception as error:  # PEFT passes on many kinds, those of transformers and torch among them
            unused = _refused(model, left, scaling, family, run=run)
            if not unused:
                raise ModelError(f"Stock PEFT cannot load an adapter for these layers ({summary(error)}).") from error
        if not unused:
            break
        reasons |= unused
    return reasons


def _refused(
    model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, family: Family, *, run: bool
) -> dict[str, str]:
    """Return the layers, or fused parameters, of each kind that PEFT refuses when it is alone, with its own words."""
    reasons: dict[str, str] = {}
    for layer_kind in dict.fromkeys(kind(name) for name in layers):
        members = {name: layer for name, layer in layers.items() if kind(name) == layer_kind}
        try:
            dropped(model, members, scaling, family, run=run)
        except Exception as error:  # noqa: BLE001 # PEFT passes on many kinds
            reasons |= {layer.group: f"PEFT refuses them ({summary(error)})" for layer in members.values()}
    return reasons


def dropped(model: Any, layers: Mapping[str, Layer], scaling: LoraScaling, family: Family, *, run: bool) -> set[str]:
    """Return the layers, or fused parameters, whose tensors PEFT does not put where they belong.

    Raises:
        Exception: what PEFT, or the model with its adapter, raises.
        ModelError: if PEFT puts adapters into other layers, too.
    """
    # Each tensor is filled with a number of its own. After PEFT's loading, a parameter that holds the number of its own
    # key has got its tensor; any other has not. Tensors of one entry that is expanded cost no memory.
    stacks = expert_stacks(layers)
    config = adapter_config(family, scaling, target_modules=explicit_targets(model, layers), experts=stacks)
    every = adapter_shapes(layers, family, scaling)
    shapes = {key: value for key, value in every.items() if not key.endswith(tuple(family.untrained))}
    marks = {key: float(number) for number, key in enumerate(shapes, 1)}
    tensors = {key: torch.full((1,) * len(shape), marks[key]).expand(shape) for key, (_, shape) in shapes.items()}
    others = {key: torch.zeros(1, dtype=torch.int32).expand(shape) for key, (_, shape) in every.items()}
    adapted = adapted_copy(model, config)
    loaded = loaded_by_peft(adapted, {**others, **tensors, **family.shared(shapes_of(layers), scaling.rank)})
    received = {
        key for key, (_, shape) in shapes.items() if _is_marked(loaded.get(parameter_of(key)), shape, marks[key])
    }
    lost = {group for key, (group, _) in shapes.items() if key not in received}
    if lost:
        return lost
    more = adapter_parameters(adapted) - {parameter_of(key) for key in received}
    if more:
        raise ModelError(f"PEFT would put {len(more)} more tensors into the model, {min(more)} among them.")
    if run and family.runs_empty:
        run_empty(adapted.get_base_model())
    return set()


def adapted_copy(model: Any, config: Any) -> Any:
    """Return a copy of an empty model with an adapter as PEFT puts it in."""
    from peft import get_peft_model

    if hasattr(config, "mask_fn"):  # of SHiRA, which would look for the entries of a mask without data
        config.mask_fn = first_entries
    with warnings.catch_warnings(action="ignore"):  # on fan_in_fan_out, which PEFT sets right
        return get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)


def first_entries(layer: Any, rank: int, **_: Any) -> Tensor:
    """Return a mask as large as that of SHiRA, with its entries in the first places, on the CPU."""
    mask = torch.zeros(layer.out_features * layer.in_features)
    mask[: rank * (layer.out_features + layer.in_features)] = 1
    return mask.view(layer.out_features, layer.in_features)


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
    """Return the names of the parameters that training an adapter changes, in a model that PEFT has changed."""
    return {
        name
        for name, parameter in adapted.named_parameters()
        if ".default" in name and ".modules_to_save." not in name and _is_saved(name)
    }


def _is_saved(name: str) -> bool:
    # AdaLoRA has a parameter for the number of directions that are left, which PEFT does not save.
    return not name.endswith(".ranknum.default")


def shapes_of(layers: Mapping[str, Layer]) -> dict[str, tuple[int, int]]:
    """Return `(out_features, in_features)` of each layer."""
    return {name: layer.shape for name, layer in layers.items()}


def parameter_of(key: str) -> str:
    """Return the parameter of a model that PEFT has changed, for the name of a tensor in an adapter file."""
    # PEFT keeps an adapter's part by its name, in modules that have a weight and a bias, or as a parameter itself. Of
    # the magnitude of DoRA the file has the parameter, and the model a module.
    module, _, name = key.rpartition(".")
    if name == "lora_magnitude_vector":
        return f"{key}.default.weight"
    return f"{module}.default.{name}" if name in {"weight", "bias"} else f"{key}.default"


def _is_marked(tensor: Tensor | None, shape: tuple[int, ...], mark: float) -> bool:
    return tensor is not None and tensor.shape == shape and tensor.flatten()[0].item() == mark
