"""Watch the inputs of layers while a block runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..models.layers import Layer
from ..models.weights import execution_device
from .windows import CalibrationDtype

Inputs = dict[str, list[Tensor]]
"""What each layer was run on, call by call."""


class _Seen(Exception):  # noqa: N818 # not an error
    """Every watched layer has been run."""


@contextmanager
def captured(layers: Mapping[str, Layer], *, cut: bool = False) -> Iterator[Inputs]:
    """Collect the inputs of resident layers inside a `with` statement.

    A linear layer is watched by a hook. An expert's input is whatever is multiplied by its slice of the fused
    parameter, whoever wrote the loop over experts.

    Args:
        layers: the layers to watch.
        cut: end the body of the statement as soon as every layer has been run once.

    Raises:
        ModelError: if the model overwrites an input after the layer has used it.
    """
    inputs: Inputs = defaultdict(list)
    versions: dict[str, list[int]] = defaultdict(list)

    def observe(name: str, tensor: Tensor) -> None:
        # Inputs are kept without a copy. PyTorch counts changes in place of each tensor; the counts are compared at the
        # end, since an input that was overwritten after its layer had used it would be measured wrongly.
        inputs[name].append(tensor)
        versions[name].append(tensor._version)  # noqa: SLF001 # counts changes in place
        if cut and len(inputs) == len(layers):
            raise _Seen

    with ExitStack() as watching:
        for name, layer in layers.items():
            if layer.expert is None:
                watching.enter_context(_hook(name, layer.module, observe))
        experts = [layer for layer in layers.values() if layer.expert is not None]
        if experts:
            watching.enter_context(_ExpertInputs(experts, observe))
        with suppress(_Seen):
            yield inputs
    for name, tensors in inputs.items():
        if [tensor._version for tensor in tensors] != versions[name]:  # noqa: SLF001
            raise ModelError(f"The model overwrites the input of {name} after use, so it cannot be measured.")


def _hook(name: str, module: nn.Module, observe: Callable[[str, Tensor], None]) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        observe(name, first_input(arguments, named))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def first_input(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return what a linear layer is run on, whether it is given by place or by name."""
    inputs: Tensor = next(iter((*arguments, *named.values())))
    return inputs


_PRODUCTS = {functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class _ExpertInputs(TorchFunctionMode):
    """Sees every product with a slice of an expert parameter."""

    def __init__(self, experts: list[Layer], observe: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._names = {place(layer.weight): layer.name for layer in experts}
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Experts are rows of one fused parameter, and the loop over them is the model's own code. What identifies an
        # expert's product, whatever that loop looks like, is the memory of the matrix on its right side.
        if func in _PRODUCTS and len(args) > 1:
            name = self._names.get(place(args[1]))
            if name is not None:
                self._observe(name, args[0])
        return func(*args, **(kwargs or {}))


def place(tensor: Tensor) -> tuple[int, int]:
    """Return address and size of a tensor: equal for all views of one expert's matrix, different between experts."""
    return tensor.data_ptr(), tensor.numel()


def arithmetic(model: Any, dtype: CalibrationDtype) -> AbstractContextManager[Any]:
    """Return the context that calibration runs in: autocast to bfloat16, or none.

    Autocast rounds weights and activations inside each product and keeps the rest, the residual stream among it, in
    the model's own dtype. The weights themselves stay as they are.
    """
    # Grams are formed outside of this context in float32, so that bfloat16 rounds what layers see and not what is kept
    # of it.
    device = execution_device(model).type
    rounded = dtype == "bfloat16" or (
        dtype == "auto" and model.dtype == torch.float32 and device == "cpu" and has_bfloat16()
    )
    return torch.autocast(device, torch.bfloat16) if rounded else nullcontext()


def has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16, and torch can tell and makes use of it."""
    # `ATEN_CPU_CAPABILITY` lets torch compute as on an older CPU. Its attention in bfloat16 then ends in an error.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    used = ("bf16", "avx512_bf16", "amx_bf16") if torch.backends.cpu.get_cpu_capability() == "AVX512" else ("bf16",)
    return any(capabilities.get(name) for name in used)


def shared_inputs(inputs: Inputs) -> list[tuple[str, ...]]:
    """Return the layers in groups that were run on the very same tensors.

    The tensors are alive, so no two of them have the same id.
    """
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensors in inputs.items():
        groups[tuple(map(id, tensors))].append(name)
    return [tuple(names) for names in groups.values()]
