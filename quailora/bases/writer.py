"""Write a quantized model as the checkpoint that transformers loads: of bitsandbytes, AutoGPTQ's or AutoAWQ's format.

A checkpoint is the tensors of the model with those of each quantized layer in place of its weight, and a
`quantization_config` that says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.layers import Layer, block_of, linear_layers, output_head
from ..models.load import LoadedModel, save_model
from .awq import awq_config, awq_tensors
from .gptq_config import gptq_config, in_first_version

Packed = Mapping[str, Mapping[str, Tensor]]
"""`QuantizedWeight.packed` of each layer, by module name."""

_FOUR_BIT = "weight.quant_state.bitsandbytes__"


def savable(layers: Mapping[str, Layer], packed: Packed) -> bool:
    """Return whether every layer is one that transformers replaces, with tensors that it can load."""
    if not all(map(is_replaced, layers.values())) or not all(packed.get(name) for name in layers):
        return False
    # Of GPTQ, transformers looks for quantized layers in the blocks of a model only.
    return all(map(block_of, layers)) or not any("qweight" in tensors for tensors in packed.values())


def is_replaced(layer: Layer) -> bool:
    """Return whether a layer is of the kind that transformers replaces by a quantized one."""
    return type(layer.module) is nn.Linear and layer.expert is None


def save_packed(folder: Path, loaded: LoadedModel, packed: Packed, *, awq: bool = False) -> None:
    """Write the checkpoint and the tokenizer; all that is not quantized keeps its dtype.

    Args:
        folder: the folder to write to.
        loaded: the full-precision model, in memory or on disk.
        packed: tensors of its quantized layers, all of one format.
        awq: write layers of AutoGPTQ's format in AutoAWQ's.

    Raises:
        ConfigurationError: if AutoAWQ's format cannot hold a layer.
    """
    model = loaded.model
    kept = [name for name in linear_layers(model) if name not in packed]
    config = awq_config(packed) if awq else quantization_config(packed, kept, head_of(model))
    state = model.state_dict()
    for name, tensors in packed.items():
        del state[f"{name}.weight"]
        stored = awq_tensors(tensors) if awq else dict(tensors)
        if config.get("checkpoint_format") == "gptq":
            stored = in_first_version(stored)
        state |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    model.config.quantization_config = config
    try:
        save_model(folder, loaded, state)
    finally:
        del model.config.quantization_config


def head_of(model: Any) -> str:
    """Return the name of the output head, which is never quantized; an empty string if the model does not say."""
    head = output_head(model)
    return next((name for name, module in model.named_modules() if module is head), "")


def quantization_config(packed: Packed, kept: Sequence[str] = (), head: str = "") -> dict[str, Any]:
    """Return what the configuration of the checkpoint says of its quantized layers, found from their tensors.

    Args:
        packed: tensors of the quantized layers.
        kept: names of the linear layers that are left in full precision.
        head: name of the output head.
    """
    keys = set(next(iter(packed.values())))
    if "qweight" in keys:
        return gptq_config(packed, kept)
    from transformers import BitsAndBytesConfig

    # A list of what is left in full precision takes the place of transformers' own, which is the output head.
    skipped = {"llm_int8_skip_modules": [*kept, *([head] if head else [])]} if kept else {}
    if "SCB" in keys:
        config = BitsAndBytesConfig(load_in_8bit=True, **skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=next(key for key in keys if key.startswith(_FOUR_BIT)).removeprefix(_FOUR_BIT),
            bnb_4bit_use_double_quant="weight.nested_absmax" in keys,
            **skipped,
        )
    content: dict[str, Any] = config.to_dict()
    return content
