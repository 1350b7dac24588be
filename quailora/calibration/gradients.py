"""Gradients of a whole model's loss, squared and summed up layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..core.weightings import Sensitivity
from ..errors import NumericalError
from ..models.layers import Layer
from ..support import distributed
from ..support.progress import track
from .capture import arithmetic, first_input
from .tokens import IGNORED_LABEL, CalibrationTokens
from .windows import CalibrationDtype


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Let no parameter of a model ask for gradients inside a `with` statement, but those that its body lets."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)


@contextmanager
def gradients(model: Any, layers: Mapping[str, Layer], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand over the gradient of each layer's weight in every backward pass inside a `with` statement.

    A gradient is dropped as soon as it has been taken, so only one layer's is held at a time.

    Args:
        model: a model in memory; it is left as it was.
        layers: its linear layers, no fused experts among them.
        take: called with the name of a layer and the gradient, (out_features, in_features), in float32.
    """

    def handing(name: str) -> Callable[[Tensor], None]:
        # Called as soon as the gradient of this weight is complete, and before those of earlier layers are.
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad.float(), None
            take(name, gradient.T if layers[name].transposed else gradient)

        return hook

    with frozen(model), ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            weight = getattr(layer.module, layer.parameter).requires_grad_()
            hooks.callback(weight.register_post_accumulate_grad_hook(handing(name)).remove)
        yield


Caught = dict[str, list[tuple[Tensor, Tensor]]]
"""Inputs of each layer, and gradients of its outputs, call by call; both (tokens, features)."""


@contextmanager
def output_gradients(model: Any, layers: Mapping[str, Layer]) -> Iterator[Caught]:
    """Collect what each backward pass inside a `with` statement says about the outputs of layers.

    Gradients of weights are made from it, see `weight_gradient`, and take far more memory. Whoever starts another pass
    clears what has been collected.

    Args:
        model: a model in memory; it is left as it was.
        layers: its linear layers, no fused experts among them.
    """
    caught: Caught = {}

    def watch(name: str, module: torch.nn.Module) -> Iterator[Any]:
        def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # Nothing in the model asks for gradients, so that they begin with the inputs of the first layers.
            if arguments:
                return (asking(arguments[0]), *arguments[1:]), named
            first = next(iter(named))
            return arguments, named | {first: asking(named[first])}

        def after(_: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            inputs = first_input(arguments, named).detach()

            def keep(gradient: Tensor) -> None:
                pair = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
                caught.setdefault(name, []).append(pair)

            # A view forgets its hooks when the model changes it in place, and outputs of linear layers are views.
            output = output.clone()
            output.register_hook(keep)  # type: ignore[no-untyped-call]
            return output

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after, with_kwargs=True)

    with frozen(model), ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            for hook in watch(name, layer.module):
                hooks.callback(hook.remove)
        yield caught


def asking(inputs: Tensor) -> Tensor:
    """Return a tensor that gradients are computed for, or from."""
    return inputs if inputs.requires_grad else inputs.detach().requires_grad_()


def weight_gradient(calls: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "out_features in_features"]:
    """Return the gradient of the weight of a layer, in float32, from inputs and gradients of outputs in all calls."""
    # In the dtype of the gradients, as the backward pass of the layer itself multiplies.
    first, *others = ((gradient.T @ inputs.to(gradient.dtype)).float() for inputs, gradient in calls)
    return sum(others, first)


def find_sensitivities(
    model: Any,
    layers: Mapping[str, Layer],
    tokens: CalibrationTokens,
    dtype: CalibrationDtype = "auto",
) -> dict[str, Sensitivity]:
    """Return the sensitivity of each layer, from one backward pass a sequence; processes share the sequences.

    Args:
        model: a transformers causal language model in memory; it is left as it was.
        layers: its linear layers, no fused experts among them.
        tokens: the loss is the mean over a sequence's tokens that count.
        dtype: arithmetic; see `Calibration`.

    Raises:
        NumericalError: if a gradient is NaN or infinite; the message names its layer.
    """
    device = next(model.parameters()).device
    rows = {name: torch.zeros(layer.shape[0], dtype=torch.float64, device=device) for name, layer in layers.items()}
    columns = {name: torch.zeros(layer.shape[1], dtype=torch.float64, device=device) for name, layer in layers.items()}

    def add(name: str, gradient: Tensor) -> None:
        squared = gradient.square()
        rows[name] += squared.mean(1)
        columns[name] += squared.mean(0)

    sequences = list(tokens)
    mine = sequences[distributed.rank() :: distributed.world_size()]
    with gradients(model, layers, add):
        for sequence, counted in track(mine, "Taking gradients", total=len(mine)):
            ids = sequence.to(device)
            targets = ids[1:] if counted is None else ids[1:].where(counted[1:].to(device), IGNORED_LABEL)
            with arithmetic(model, dtype):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            torch.autograd.backward(functional.cross_entropy(logits.float(), targets))
    found = {}
    for name in layers:
        total = [distributed.add_up(each[name]) / len(sequences) for each in (rows, columns)]
        if not total[0].isfinite().all():
            raise NumericalError(f"The gradient of {name} is NaN or infinite. Try another calibration dtype.")
        found[name] = Sensitivity(*total)
    return found
