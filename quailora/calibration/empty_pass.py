"""Run a model that has no weights, to see which of its layers a text reaches.

Weights lie on the device "meta", activations are zeros on the CPU. So the model's own code runs as it would on text,
its decisions about data included, and costs next to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..models.layers import Layer, linear_layers
from .blocks import FROM_MODELS, run_body
from .capture import Inputs, shared_inputs

_TOKENS = 4


@final
class EmptyWeights(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no annotation
    """Lets operations on weights without data and on activations give zeros of the right shape.

    What is computed from weights alone stays without data; everything else lies on the CPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # Three cases. Nothing without data: the operation runs as it is, on the CPU. Only weights: the result is
        # without data, too. Weights and activations: the shape of the result is found on the device "meta", and zeros
        # of that shape stand for it, so that whatever the model's code decides by looking at activations can be
        # decided.
        named = dict(kwargs or {})
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, named))
        empty = [tensor.device.type == "meta" for tensor in tensors]
        if any(empty):
            return self._on_shapes(func, args, named, stays=all(empty))
        if "device" in named:
            named["device"] = torch.device("cpu")
        return func(*args, **named)

    @staticmethod
    def _on_shapes(func: Any, args: Any, named: dict[str, Any], *, stays: bool) -> Any:
        # A number that is read from a weight without data is taken for zero. Writing into an activation changes nothing
        # that is looked at later. Everything else runs on "meta", which knows shapes and dtypes only.
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 # `item` and `bool`
            return torch.zeros((), dtype=args[0].dtype).item()
        if func._schema.is_mutable and not stays:  # noqa: SLF001 # what is written does not matter
            return args[0]
        if named.get("device") is not None:
            stays = stays and torch.device(named["device"]).type == "meta"
            named["device"] = torch.device("meta")
        shapes = func(*tree_map_only(Tensor, _without_data, args), **tree_map_only(Tensor, _without_data, named))
        return shapes if stays else tree_map_only(Tensor, lambda each: torch.zeros_like(each, device="cpu"), shapes)


def _without_data(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else torch.empty_like(tensor, device="meta")


@torch.no_grad()
def run_empty(model: Any) -> None:
    """Run an empty model on a few tokens.

    Raises:
        Exception: one of `FROM_MODELS`, if the model's code does not run without weights.
    """
    with suppress(ValueError, AttributeError):  # where a model has no choice of implementations
        model.set_experts_implementation("eager")
    with EmptyWeights():  # type: ignore[no-untyped-call]
        run_body(model, torch.zeros(1, _TOKENS, dtype=torch.long))


@final
@dataclass(frozen=True)
class Reach:
    """Which linear layers of a model are run when it is given text.

    Attributes:
        known: whether the model runs without weights; if not, every layer counts as reached.
        silent: layers that no text reaches.
        odd: layers of derived classes that do not turn one input into one output: some routers return more than one
            tensor, some layers work on groups.
        shared: layers in groups that are run on the very same tensors, in the order in which they are run.
    """

    known: bool
    silent: frozenset[str] = frozenset()
    odd: frozenset[str] = frozenset()
    shared: tuple[tuple[str, ...], ...] = ()

    def watched(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return the layers that are quantized with statistics of their inputs."""
        return {name: layer for name, layer in layers.items() if name not in self.silent | self.odd}

    def distinct(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return one layer for each tensor that layers are run on; all of them where that is not known."""
        groups = [[name for name in names if name in layers] for names in self.shared]
        others = {name for group in groups for name in group[1:]}
        return {name: layer for name, layer in layers.items() if name not in others}

    def idle(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return the layers that can be quantized without statistics only."""
        return {name: layer for name, layer in layers.items() if name in self.silent}


def find_reach(model: Any) -> Reach:
    """Return what text does to the linear layers of an empty model.

    A numbered module inside a block, such as one of many experts, counts as reached if one of its siblings is: which
    of them a token takes depends on the weights.
    """
    layers, plain = linear_layers(model), dict[str, bool]()
    inputs: Inputs = defaultdict(list)
    with ExitStack() as hooks:
        for layer in layers.values():
            hook = _noting(plain, inputs, layer)
            hooks.enter_context(layer.module.register_forward_hook(hook, with_kwargs=True))
        try:
            run_empty(model)
        except FROM_MODELS:
            return Reach(known=False)
    reached = {_any_sibling(name) for name in plain}
    return Reach(
        known=True,
        silent=frozenset(name for name in layers if _any_sibling(name) not in reached),
        odd=frozenset(name for name in plain if not plain[name]),
        shared=tuple(shared_inputs(inputs)),
    )


def _noting(
    plain: dict[str, bool], inputs: Inputs, layer: Layer
) -> Callable[[nn.Module, Any, dict[str, Any], Any], None]:
    def hook(_: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        first = next(iter((*arguments, *named.values())))
        inputs[layer.name].append(first)
        plain[layer.name] = isinstance(output, Tensor) and output.shape == (*first.shape[:-1], layer.shape[0])

    return hook


def _any_sibling(name: str) -> str:
    """Return a name with `#` in place of every number but the one of its block."""
    # `model.layers.3.mlp.experts.7.up_proj` -> `model.layers.3.mlp.experts.#.up_proj`: the first number is the block's.
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(part if index <= first or not part.isdigit() else "#" for index, part in enumerate(parts))
