"""Watch the inputs of a model's layers in one forward pass over the calibration windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..calibration import CalibrationDtype
from ..errors import CalibrationError
from ..progress import track
from ..statistics import InputStatistics

_TOKENS_PER_PASS = 4096
_PROBE_TOKENS = 8


@torch.no_grad()
def collect_statistics(
    model: Any,
    layers: Mapping[str, nn.Module],
    windows: Int[Tensor, "samples sequence_length"],
    dtype: CalibrationDtype = "auto",
) -> dict[str, InputStatistics]:
    """Return the statistics of each layer's inputs, from one pass of the full-precision model.

    Layers that receive the very same tensor (query, key and value; gate and up) share one object, which is computed
    once. The output head is not run.

    Args:
        model: a transformers causal language model.
        layers: the layers to watch, by name.
        windows: token ids.
        dtype: arithmetic of the pass; see `Calibration`.

    Raises:
        CalibrationError: if a layer is never run.
        NumericalError: if an input is NaN or infinite.
    """
    body = model.base_model
    device = next(model.parameters()).device
    leaders = shared_inputs(body, layers, windows[:1, :_PROBE_TOKENS].to(device))
    collected: dict[str, InputStatistics] = {}

    def observe(name: str, inputs: Tensor) -> None:
        if name not in collected:
            collected[name] = InputStatistics(inputs.shape[-1], inputs.device)
        collected[name].update(inputs)

    with ExitStack() as hooks:
        for name in dict.fromkeys(leaders.values()):
            hooks.enter_context(watch(name, layers[name], observe))
        hooks.enter_context(arithmetic(model, dtype))
        per_pass = max(1, _TOKENS_PER_PASS // windows.shape[1])
        for batch in track(torch.split(windows, per_pass), "Calibrating"):
            body(input_ids=batch.to(device), use_cache=False)

    silent = [name for name, leader in leaders.items() if leader not in collected]
    if silent:
        raise CalibrationError(
            f"{len(silent)} layers received no calibration token, {silent[0]} among them. "
            "Leave them out of the targets, or calibrate on more text."
        )
    return {name: collected[leader] for name, leader in leaders.items()}


def arithmetic(model: Any, dtype: CalibrationDtype) -> AbstractContextManager[Any]:
    """Return the context that the calibration pass runs in: autocast to bfloat16, or none.

    Autocast rounds weights and activations inside each product and keeps the rest, the residual stream among it, in
    the model's own dtype. The weights themselves stay as they are.
    """
    device = next(model.parameters()).device.type
    wanted = dtype == "bfloat16" or (
        dtype == "auto" and model.dtype == torch.float32 and device == "cpu" and has_bfloat16()
    )
    return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()


def has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16, and torch can tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def shared_inputs(body: Any, layers: Mapping[str, nn.Module], probe: Int[Tensor, "1 tokens"]) -> dict[str, str]:
    """Return for each layer the first layer that receives the same tensor object, found by running a few tokens.

    A layer that runs several times, or not at all, in the probe stands for itself.
    """
    seen: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def observe(name: str, inputs: Tensor) -> None:
        seen[name] = inputs  # kept alive, so that no two inputs can have the same id
        calls[name] += 1

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(watch(name, module, observe))
        body(input_ids=probe, use_cache=False)

    first: dict[int, str] = {}
    leaders = {}
    for name in layers:
        once = calls[name] == 1
        leaders[name] = first.setdefault(id(seen[name]), name) if once else name
    return leaders


def watch(name: str, module: nn.Module, observe: Callable[[str, Tensor], None]) -> Any:
    """Call `observe` with every input of a module; the returned handle is a context manager that ends it."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        observe(name, next(iter((*arguments, *named.values()))))

    return module.register_forward_pre_hook(hook, with_kwargs=True)
