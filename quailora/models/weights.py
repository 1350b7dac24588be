"""Bring weights from disk into memory, and put other weights in their place for a while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..support.files import write_tensors
from ..support.machine import free_memory
from .layers import Layer


def is_offloaded(model: nn.Module) -> bool:
    """Return whether some weights of a model wait on disk."""
    return any(hook is not None and hook.offload for hook in map(hook_of, model.modules()))


def hook_of(module: nn.Module) -> Any:
    """Return accelerate's hook on a module, which fetches its weights; None where there is none."""
    return getattr(module, "_hf_hook", None)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Hold all weights of a module and its children in memory inside a `with` statement.

    Where accelerate keeps them on disk, its hooks would fetch and drop each weight around every forward pass; here they
    are fetched once. Memory-mapped files need no anonymous memory as long as they need no other dtype or device.
    """
    # accelerate's hook fetches weights in `pre_forward` and drops them in `post_forward`. With its flag `offload` off
    # it does neither, so that the weights stay until they are dropped here.
    held = []
    try:
        for child in module.modules():
            hook = hook_of(child)
            if hook is not None and hook.offload:
                hook.pre_forward(child)
                hook.offload = False
                held.append((child, hook))
        yield
    finally:
        for child, hook in held:
            hook.offload = True
            hook.post_forward(child, None)


@contextmanager
def replaced(layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let resident layers compute with other weights inside a `with` statement.

    Args:
        layers: layers by name.
        weights: (out_features, in_features) for some or all of them; layers without one stay as they are.
    """
    originals = {}
    try:
        for (module, attribute), members in by_parameter(layers, weights).items():
            parameter = getattr(module, attribute)
            originals[module, attribute] = parameter.data
            parameter.data = stored(members, weights).to(parameter.data)
        yield
    finally:
        for (module, attribute), data in originals.items():
            getattr(module, attribute).data = data


@contextmanager
def biased(layers: Mapping[str, Layer], biases: Mapping[str, Tensor]) -> Iterator[None]:
    """Add a bias to the outputs of linear layers inside a `with` statement.

    Args:
        layers: layers by name.
        biases: (out_features,) for some or all of them.
    """
    hooks = []
    try:
        for name, bias in biases.items():
            hooks.append(layers[name].module.register_forward_hook(_adding(bias)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(bias: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, __, output: output + bias.to(output)


def beside(layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights in the memory where their layers are, so that they need not be copied each time they are used.

    They stay where they are if they would take more than half of what is free there.

    Args:
        layers: resident layers by name.
        weights: (out_features, in_features) for some or all of them.
    """
    # Half of what is free: the other half is for activations and for what the body of the loop needs.
    size = sum(layers[name].weight.nbytes for name in weights)
    devices = {layers[name].weight.device for name in weights}
    if devices == {torch.device("cpu")} or any(2 * size > free_memory(device) for device in devices):
        return weights
    return {name: weight.to(layers[name].weight) for name, weight in weights.items()}


def replace_for_good(layers: Mapping[str, Layer], weights: Mapping[str, Tensor], spill: Path) -> None:
    """Let a model have other weights from now on, also in what `save_pretrained` writes.

    Args:
        layers: layers by name; experts only with all others of their parameter.
        weights: (out_features, in_features) for each of them; may be memory-mapped.
        spill: folder for the weights of a model on disk.
    """
    from safetensors.torch import load_file

    for (module, attribute), members in by_parameter(layers, weights).items():
        # Weights on disk have no memory to copy into. `save_pretrained` takes them from accelerate's map, so that the
        # map gets another file for this weight, memory-mapped like the checkpoint's own.
        weight = stored(members, weights)
        parameter = getattr(module, attribute)
        if parameter.device.type != "meta":
            parameter.data.copy_(weight)
            continue
        path = spill / f"{members[0].group}.safetensors"
        write_tensors(path, {"weight": weight.contiguous()})
        mapping = hook_of(module).weights_map
        mapping.dataset.state_dict[f"{mapping.prefix}{attribute}"] = load_file(path)["weight"]


def by_parameter(layers: Mapping[str, Layer], names: Iterable[str]) -> dict[tuple[nn.Module, str], list[Layer]]:
    """Return layers by the parameter that holds them."""
    parameters: dict[tuple[nn.Module, str], list[Layer]] = defaultdict(list)
    for name in names:
        parameters[layers[name].module, layers[name].parameter].append(layers[name])
    return parameters


def stored(members: Sequence[Layer], weights: Mapping[str, Tensor]) -> Tensor:
    """Return the weights of a linear layer, or of all experts of a parameter, in the way that the model holds them."""
    turned = [weights[layer.name].T if layer.transposed else weights[layer.name] for layer in members]
    return turned[0] if members[0].expert is None else torch.stack(turned)


def compute_on(model: Any, device: str) -> None:
    """Let an offloaded model fetch its weights to a device."""
    for module in model.modules():
        hook = hook_of(module)
        if hook is not None:
            hook.execution_device = device
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def execution_device(model: Any) -> torch.device:
    """Return the device that a model computes on, also where its weights wait on disk."""
    hook = hook_of(model)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    device: torch.device = next(model.parameters()).device
    return device
