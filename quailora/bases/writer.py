"""Write a quantized model as the checkpoint that transformers loads: of bitsandbytes, AutoGPTQ's or AutoAWQ's format.

A checkpoint is the tensors of the model with those of each quantized layer in place of its weight, and a
`quantization_config` that says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.layers import Layer, block_of
from ..models.load import LoadedModel, save_model
from ..quantizers.packing import pack_words, unpack_words
from .awq import awq_config, awq_tensors

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
    config, model = awq_config(packed) if awq else quantization_config(packed), loaded.model
    state = model.state_dict()
    for name, tensors in packed.items():
        del state[f"{name}.weight"]
        stored = awq_tensors(tensors) if awq else dict(tensors)
        if config.get("checkpoint_format") == "gptq":
            stored["qzeros"] = pack_words(unpack_words(stored["qzeros"], config["bits"]) - 1, config["bits"])
        state |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    model.config.quantization_config = config
    try:
        save_model(folder, loaded, state)
    finally:
        del model.config.quantization_config


def quantization_config(packed: Packed) -> dict[str, Any]:
    """Return what the configuration of the checkpoint says of its quantized layers, found from their tensors."""
    keys = set(next(iter(packed.values())))
    if "qweight" in keys:
        return gptq_config(packed)
    from transformers import BitsAndBytesConfig

    if "SCB" in keys:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=next(key for key in keys if key.startswith(_FOUR_BIT)).removeprefix(_FOUR_BIT),
            bnb_4bit_use_double_quant="weight.nested_absmax" in keys,
        )
    content: dict[str, Any] = config.to_dict()
    return content


def gptq_config(packed: Packed) -> dict[str, Any]:
    """Return the same for AutoGPTQ's format.

    Its first version, "gptq", which everything reads, stores zero points less one and has no place for zero; "gptq_v2"
    stores them as they are.
    """
    # One configuration stands for all layers: the group size is that of the largest group, `desc_act` is needed if any
    # layer has its columns out of order, and `sym` holds only if every zero point of every layer is in the middle.
    first = next(iter(packed.values()))
    bits = len(first["qweight"]) * 32 // len(first["g_idx"])
    group_size, ordered, symmetric, lowest = -1, True, True, 2**bits
    for tensors in packed.values():
        groups, zeros = tensors["g_idx"], unpack_words(tensors["qzeros"], bits)
        if groups.any():
            group_size = max(group_size, int(groups.bincount().max()))
        ordered = ordered and bool((groups.diff() >= 0).all())
        symmetric = symmetric and bool((zeros == 2 ** (bits - 1)).all())
        lowest = min(lowest, int(zeros.min()))
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": not ordered,
        "sym": symmetric,
        "checkpoint_format": "gptq" if lowest > 0 else "gptq_v2",
        "lm_head": False,
    }
