"""Write the corrections of a model as an adapter that stock PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.objective import Factors
from ..errors import ConfigurationError
from ..families import Correction
from ..families.adapter import PeftAdapter
from ..models.layers import Layer
from ..support.files import write_json, write_tensors
from .frozen_start import noting_start
from .lora import PREFIX, ExpertStack, LoraScaling, expert_stacks
from .provenance import Origin


def write_adapter(
    folder: Path,
    corrections: Mapping[str, Correction],
    family: PeftAdapter,
    scaling: LoraScaling,
    *,
    target_modules: Sequence[str],
    base_model: str,
    experts: Sequence[ExpertStack] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    origin: Origin | None = None,
    modules: Mapping[str, Tensor] | None = None,
    modules_to_save: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    PEFT's scaling is divided out here and nowhere else: each factor of a low-rank `C` is divided by `sqrt(s)`, which
    keeps the factors balanced. PEFT makes float32 of all tensors when it loads them.

    Args:
        folder: an existing folder.
        corrections: correction of each layer, by name.
        family: the family of all of them.
        scaling: ranks and alphas; the ranks must be those of the corrections.
        target_modules: what PEFT wraps; explicit names, since `all-linear` finds nothing on some quantized layers.
        base_model: hub name or folder of the base.
        experts: the fused parameters that the corrections of experts belong to.
        shapes: `(out_features, in_features)` of each layer, for families in which layers share tensors.
        origin: what the adapter is made from, to be noted in its configuration with the hash of the tensors.
        modules: tensors of the modules that are trained whole, by their names in the file.
        modules_to_save: names of these modules in the configuration.
        dtype: dtype that tensors are stored in, float32 or bfloat16.

    Raises:
        ValueError: if the tensors of a correction have other shapes than its rank gives.
    """
    tensors = adapter_tensors(corrections, family, scaling, experts, shapes, dtype)
    config = adapter_config(family, scaling, target_modules=target_modules, base_model=base_model, experts=experts)
    config.modules_to_save = list(modules_to_save) or None
    # PEFT's own `save_pretrained` writes the same content, but its sets in an order that changes from run to run.
    content = config.to_dict() | {"target_modules": sorted(target_modules)}
    if origin is not None:
        content |= noting_start(origin, tensors).as_config()
    write_json(folder / "adapter_config.json", content)
    write_tensors(folder / "adapter_model.safetensors", tensors | dict(modules or {}))


def adapter_tensors(
    corrections: Mapping[str, Correction],
    family: PeftAdapter,
    scaling: LoraScaling,
    experts: Sequence[ExpertStack] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the tensors of an adapter file by their names; see `write_adapter`."""
    stacked = {name for stack in experts for name in stack.members}
    tensors: dict[str, Tensor] = {}
    for name, correction in corrections.items():
        if name not in stacked:
            stored = stored_parameters(name, correction, scaling, dtype)
            tensors |= {f"{PREFIX}{name}.{end}": tensor for end, tensor in stored.items()}
    for stack in experts:
        stored_members = [
            stored_parameters(stack.parameter, corrections[name], scaling, dtype) for name in stack.members
        ]
        factors = [Factors(stored["lora_B.weight"], stored["lora_A.weight"]) for stored in stored_members]
        tensors |= stack.tensors(factors)
    shared = family.shared(shapes or {}, scaling.rank)
    return tensors | {name: kept(tensor, dtype) for name, tensor in shared.items()}


def adapter_config(
    family: PeftAdapter,
    scaling: LoraScaling,
    *,
    target_modules: Sequence[str],
    base_model: str | None = None,
    experts: Sequence[ExpertStack] = (),
) -> Any:
    """Return PEFT's configuration of an adapter; see `write_adapter`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType

    arguments: dict[str, Any] = family.config(scaling.as_config())
    if family.peft_type == "LORA":
        parameters = [stack.parameter for stack in experts] or None
        arguments |= {"target_parameters": parameters, "init_lora_weights": True, "lora_dropout": 0.0, "bias": "none"}
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[family.peft_type]
    return config(
        **arguments,
        target_modules=list(target_modules),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def adapter_shapes(
    layers: Mapping[str, Layer], family: PeftAdapter, scaling: LoraScaling
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of an adapter file for these layers: by name, the layer or fused parameter, and the shape.

    Raises:
        ConfigurationError: if there are fused experts, and the family is not LoRA.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    stacks = {stack.parameter: (stack.place, len(stack.members)) for stack in expert_stacks(layers)}
    if stacks and family.name != "lora":
        raise ConfigurationError(
            f"PEFT puts no adapter but LoRA into fused experts, got {family!r}. Leave experts out of the targets."
        )
    for layer in layers.values():
        stem, members = stacks.get(layer.group, (f"{PREFIX}{layer.name}", 1))
        ends = family.shapes(layer.shape, scaling.rank_of(layer.group))
        if members > 1:
            rank = scaling.rank_of(layer.group) * members
            ends = {"lora_A.weight": (rank, layer.shape[1]), "lora_B.weight": (layer.shape[0], rank)}
        shapes |= {f"{stem}.{end}": (layer.group, shape) for end, shape in ends.items()}
    return shapes


def stored_parameters(
    name: str, correction: Correction, scaling: LoraScaling, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the tensors of a layer as PEFT stores them, with PEFT's scaling divided out, on the CPU.

    Raises:
        ValueError: if the rank of a low-rank correction is not the one that the scaling states.
    """
    family = correction.family
    if family.name == "lora" and correction.rank != scaling.rank_of(name):
        raise ValueError(f"Expected rank {scaling.rank_of(name)} in {name}, got {correction.rank}.")
    stored = family.stored(correction.parameters, scaling.scale_of(name, family))
    return {end: kept(tensor, dtype) for end, tensor in stored.items()}


def kept(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor as a file has it: floating-point numbers in a dtype, on the CPU."""
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
