"""One layer with an adapter, as stock PEFT and bitsandbytes compute it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.files import write_adapter
from ..adapters.lora import LoraScaling
from ..errors import ConfigurationError
from ..families import Correction

StockBase = Literal["float", "nf4", "int8"]


def stock_layer(weight: Tensor, base: StockBase) -> Single:
    """Return a module whose only layer, `layer`, is quantized as bitsandbytes does it, or holds the weight as it is.

    Args:
        weight: (out_features, in_features), float32.
        base: "nf4" and "int8" are those of bitsandbytes.
    """
    import bitsandbytes as bnb

    rows, columns = weight.shape
    layer: nn.Module
    if base == "nf4":
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    elif base == "int8":
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return Single(layer.to(weight.device), base)


class Single(nn.Module):
    """A module around one layer, in which PEFT finds it."""

    def __init__(self, layer: nn.Module, base: StockBase) -> None:
        super().__init__()
        self.layer = layer
        # What transformers notes on a model, and PEFT chooses some of its layers by.
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = base == "nf4", base == "int8"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output of the layer."""
        output: Tensor = self.layer(inputs)
        return output


def dequantized(module: nn.Module) -> Tensor:
    """Return `Q` of the layer of `stock_layer` as PEFT sees it, float32."""
    from peft.utils.integrations import dequantize_module_weight

    layer: Any = module.layer
    if type(layer).__name__ == "Linear8bitLt" and layer.state.SCB is None:  # before its first pass
        layer.state.SCB = layer.weight.SCB
    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach().float()


def load_stock(module: nn.Module, correction: Correction, rank: int, alpha: float | None = None) -> Any:
    """Write the files of an adapter for the layer of `stock_layer`, and load them with stock PEFT.

    Args:
        module: the base.
        correction: the adapter of its layer.
        rank: size of the adapter.
        alpha: `lora_alpha`; the rank if None.

    Returns:
        A `PeftModel` whose adapter can be trained.

    Raises:
        ConfigurationError: if PEFT does not load every tensor of the file.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    family = correction.family
    scaling = LoraScaling(rank, alpha)
    shape = family_shape(module)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        folder = Path(name)
        write_adapter(
            folder,
            {"layer": correction},
            family,
            scaling,
            target_modules=["layer"],
            base_model="base",
            shapes={"layer": shape},
        )
        config = PeftConfig.from_pretrained(name)
        config.task_type = None  # a single layer is no language model
        loaded = PeftModel.from_pretrained(module, name, config=config, is_trainable=True)
        missing = lost_tensors(loaded, load_peft_weights(name, device="cpu"))
    if missing:
        raise ConfigurationError(f"Stock PEFT does not load {sorted(missing)} of {family!r}.")
    return loaded


def family_shape(module: nn.Module) -> tuple[int, int]:
    """Return `(out_features, in_features)` of the layer of `stock_layer`."""
    layer: Any = module.layer
    return layer.out_features, layer.in_features


def lost_tensors(loaded: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the tensors of a file that a loaded adapter does not hold."""
    from peft import get_peft_model_state_dict

    there: dict[str, Tensor] = get_peft_model_state_dict(loaded)
    lost = {
        name
        for name, tensor in tensors.items()
        if name not in there or not torch.equal(there[name].cpu().to(tensor.dtype), tensor)
    }
    # Layers may hold one tensor together, which the file has once. PEFT knows it by several names.
    held = {there[name].data_ptr() for name in tensors if name in there}
    return lost | {name for name in there.keys() - tensors.keys() if there[name].data_ptr() not in held}
