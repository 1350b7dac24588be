"""Write a model whose 4-bit weights were chosen by us as the checkpoint that stock transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .layers import Layer
from .load import LoadedModel, quiet_transformers

_STATE = "quant_state.bitsandbytes__"


def savable(layers: Mapping[str, Layer], stored: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Return whether every layer is one that transformers' bitsandbytes integration replaces, with 4-bit tensors."""
    plain = all(layer.expert is None and isinstance(layer.module, nn.Linear) for layer in layers.values())
    return plain and all(stored.get(name) for name in layers)


def save_four_bit(folder: Path, loaded: LoadedModel, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the checkpoint.

    transformers loads and quantizes the model; the weights are then exchanged, and it saves what it would save.

    Args:
        folder: to write to.
        loaded: the full-precision model.
        stored: `FourBitWeight.packed` of each layer.
    """
    from bitsandbytes.nn import Params4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    keys = set(next(iter(stored.values())))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=next(key for key in keys if key.startswith(_STATE)).removeprefix(_STATE),
        bnb_4bit_use_double_quant="nested_absmax" in keys,
    )
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(loaded.name, quantization_config=config, dtype=loaded.model.dtype)
        for name, tensors in stored.items():
            module = model.get_submodule(name)
            rest = {key: tensor for key, tensor in tensors.items() if key != "codes"}
            module.weight = Params4bit.from_prequantized(
                tensors["codes"], rest, device=module.weight.device, module=module
            )
        model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
