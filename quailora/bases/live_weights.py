"""The weight of one quantized layer in memory: of bitsandbytes, GPTQ, AWQ, HQQ or torchao.

Each kind of layer gives the tensors that a checkpoint would hold, and the reader of that kind of checkpoint makes the
weight of them. A layer is recognised by its class where its package is imported already, so nothing is imported here,
and otherwise by the tensors that it holds.
"""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericalWarning
from ..models.weights import resident
from ..quantizers import QuantizedWeight
from ..quantizers.base import check_finite
from .awq import read_awq
from .bitsandbytes import read_bitsandbytes
from .gptq import read_gptq
from .hqq import read_hqq
from .torchao import read_torchao

Kind = Literal["bitsandbytes", "gptq", "awq", "hqq", "torchao"]

_CLASSES: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "bitsandbytes": ("bitsandbytes.nn", ("Linear4bit", "Linear8bitLt")),
    "hqq": ("hqq.core.quantize", ("HQQLinear",)),
}
"""By kind, the module of its package and the classes in it that hold quantized weights."""

_PROBES = 4
_AGREEMENT = 0.1  # relative; kernels in float16 and bfloat16 stay below 0.02, rearranged codes give about 1


def kind_of(module: nn.Module) -> Kind | None:
    """Return which package's quantized layer a module is; None for every other module, linear layers among them."""
    for kind, (package, names) in _CLASSES.items():
        imported = sys.modules.get(package)
        if imported is not None and isinstance(module, tuple(getattr(imported, name) for name in names)):
            return kind
    tensors = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
    if {"qweight", "qzeros", "scales"} <= tensors.keys():
        # The words of AutoGPTQ run along the inputs, so that each output has a column; those of AutoAWQ do not.
        by_output = tensors["qweight"].shape[-1] == tensors["scales"].shape[-1]
        return "gptq" if by_output or "g_idx" in tensors else "awq"
    weight = tensors.get("weight")
    return "torchao" if weight is not None and type(weight.data).__module__.startswith("torchao.") else None


def live_weight(
    module: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None
) -> QuantizedWeight | None:
    """Return the weight of a quantized layer as the layer computes with it.

    Args:
        module: `Linear4bit` or `Linear8bitLt` of bitsandbytes, a layer of GPTQ or AWQ with `qweight`, `qzeros` and
            `scales`, hqq's `HQQLinear`, or a linear layer whose weight is a tensor of torchao.
        dtype: the dtype that the dequantized weight shall have.
        device: the device that the weight is read to; by default the one that it is on.

    Returns:
        The weight, or None for a module that is no such layer.

    Raises:
        ModelError: if the layer is not quantized yet, its tensors are damaged or of a format that is not read here, or
            a kernel has rearranged them.
        NumericalError: if the weight is not finite.
    """
    kind = kind_of(module)
    if kind is None:
        return None
    with torch.no_grad(), resident(module):
        tensors: dict[str, Tensor] = _TENSORS[kind](module)
        if "qweight" in tensors and tensors["qweight"].dtype != torch.int32:
            raise rearranged(module, f"its codes are {tensors['qweight'].dtype} in place of words of 32 bits")
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ModelError("Expected a layer whose tensors are in memory, got one without data (on the device meta).")
        found = {name: tensor if device is None else tensor.to(device) for name, tensor in tensors.items()}
        weight: QuantizedWeight = _READERS[kind](found, _config(module), dtype)
        check_finite(weight.dequantize())
        if kind in ("gptq", "awq"):
            check_order(module, weight)
    return weight


def bitsandbytes_tensors(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer of bitsandbytes in 4 or 8 bits, with their names in a checkpoint.

    Raises:
        ModelError: if the layer still has, or always keeps, its weight in full precision.
    """
    if module.weight.is_floating_point() and getattr(module.weight, "quant_state", None) is None:
        if getattr(module.weight, "has_fp16_weights", False):
            raise ModelError(
                "Expected a layer that holds its weight in 8 bits, got one of bitsandbytes with has_fp16_weights=True, "
                "which keeps it in 16. Make the layer with has_fp16_weights=False."
            )
        raise ModelError(
            "Expected a quantized layer, got one of bitsandbytes that is not quantized yet: it quantizes its weight "
            "when it is moved to a device. Call model.to(...) first, also for the CPU."
        )
    if hasattr(module, "state"):  # of 8 bits, which hands its scales over to this state when it runs
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return {"weight": module.weight.data, "SCB": scales}
    codes, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = as_stored(codes, state)
    return {"weight": codes} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


def as_stored(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return codes and description of a layer of 4 bits as a checkpoint has them, after the layer ran on the CPU.

    On processors that multiply in bfloat16 bitsandbytes then keeps the codes in another order, and the scales only in
    bfloat16. Its own way back finds the codes as they were and 8-bit scales that are near those that were. The layer
    itself stays as it is.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    warnings.warn(
        "Layers of bitsandbytes have run on this CPU in evaluation mode, which packed them in another way for good. "
        "No gradient passes through them any more, so do not train this model. Their scales were rounded to bfloat16, "
        "so corrections are found for weights that differ in the third digit from those of the checkpoint. Load the "
        "model again, and initialize and train it before it runs in evaluation mode.",
        NumericalWarning,
        stacklevel=2,
    )
    found: tuple[Tensor, Any] = _convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    return found


def packed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer of GPTQ or AWQ, with their names in a checkpoint."""
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: getattr(module, name, None) for name in names}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.numel()}


def hqq_tensors(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer of hqq, with their names in a checkpoint.

    Raises:
        ModelError: if the layer is not quantized yet.
    """
    if module.W_q is None or module.meta is None:
        raise ModelError("Expected a quantized layer, got an HQQLinear that is not initialized yet: call initialize().")
    meta = dict(module.meta)
    if "zero_scale" in meta:  # both in one tensor, which hqq can keep in pinned memory
        meta["zero"], meta["scale"] = meta["zero_scale"].unbind()
    stored = {"W_q": module.W_q.data} | {name: meta[name] for name in ("scale", "zero") if name in meta}
    tensors = {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in stored.items()}
    return tensors | {
        "shape": torch.tensor(tuple(meta["shape"])),
        "packing": torch.tensor(list(str(meta["packing"]).encode()), dtype=torch.uint8),
    }


def torchao_tensors(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a weight of torchao, with their names in a checkpoint.

    Raises:
        ModelError: if it is no int8 weight, or one whose inputs are scaled channel by channel first.
    """
    weight = module.weight.data
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if codes is None or scale is None or getattr(weight, "act_pre_scale", None) is not None:
        raise ModelError(
            f"Expected torchao's int8 weights, as Int8WeightOnlyConfig makes them, got {type(weight).__name__}."
        )
    zero_point = getattr(weight, "zero_point", None)
    tensors = {"_weight_qdata": codes, "_weight_scale": scale}
    return tensors if zero_point is None else tensors | {"_weight_zero_point": zero_point}


_TENSORS: dict[Kind, Any] = {
    "bitsandbytes": bitsandbytes_tensors,
    "gptq": packed_tensors,
    "awq": packed_tensors,
    "hqq": hqq_tensors,
    "torchao": torchao_tensors,
}
_READERS: dict[Kind, Any] = {
    "bitsandbytes": read_bitsandbytes,
    "gptq": read_gptq,
    "awq": read_awq,
    "hqq": read_hqq,
    "torchao": read_torchao,
}


def _config(module: Any) -> dict[str, Any]:
    """Return what the readers would find in the `quantization_config` of a checkpoint with this layer.

    Only GPTQ needs it: gptqmodel says whether zero points are stored less one, and older packages always store them so.
    """
    layout = getattr(module, "qzero_format", None)
    version = layout() if callable(layout) else 1
    checkpoint_format = "gptq_v2" if version == 2 else "gptq"
    return {"checkpoint_format": checkpoint_format, "group_size": getattr(module, "group_size", None)}


def check_order(module: nn.Module, weight: QuantizedWeight) -> None:
    """Compare what a layer computes with what the weight that was read would compute, on a few random inputs.

    Fast kernels for GPTQ and AWQ rearrange the codes in memory, some without a trace in names, shapes or dtypes.

    Args:
        module: the layer.
        weight: as it was read from the layer's tensors, which running the layer may rearrange.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    matrix = weight.dequantize()
    scales: Any = module.scales
    bias: Any = getattr(module, "bias", None)
    dtype = scales.dtype if scales.is_floating_point() else torch.float16
    probes = torch.randn(_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(scales.device, dtype)
    try:
        found = on_a_copy(module, probes).float()
    except Exception as error:  # packages raise many kinds, down to those of compilers
        raise rearranged(module, f"it does not run here ({type(error).__name__})") from error
    expected = probes.float() @ matrix.to(probes.device).float().T
    if bias is not None:
        found = found - bias.float()
    share = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if not share <= _AGREEMENT:
        raise rearranged(module, f"on random inputs the two differ by {share:.0%}")


def on_a_copy(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a layer computes, without letting it change: some kernels rearrange their codes when they first run.

    Layers that cannot be copied are run as they are.
    """
    with suppress(RuntimeError, TypeError):
        module = copy.deepcopy(module)
    outputs: Tensor = module(inputs)
    return outputs


def rearranged(module: nn.Module, reason: str) -> ModelError:
    """Return the error for a layer whose kernel holds its codes in an order of its own."""
    return ModelError(
        f"Expected a layer that computes with its tensors as a checkpoint holds them, got {type(module).__name__}, "
        f"whose kernel seems to have rearranged them: {reason}. Load the model with a plain kernel, such as "
        "GPTQConfig(backend='gptq_torch')."
    )
