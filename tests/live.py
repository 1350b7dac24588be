"""Models with quantized layers of each kind in memory, as stock packages make them or as gptqmodel's layers behave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from quailora import NF4, Uniform
from quailora.models.layers import linear_layers
from quailora.quantizers.packing import unpack_words

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
KINDS = ("bitsandbytes-4", "bitsandbytes-8", "gptq", "hqq", "torchao")


class PackedLinear(nn.Module):
    """A layer with the tensors and the calling convention of gptqmodel's plain kernel, which needs no other package.

    Args:
        packed: `qweight`, `qzeros`, `scales` and `g_idx`; zero points as they are.
        bits: width of a code.
        version: 1 stores zero points less one and says so, 2 stores them as they are.
    """

    def __init__(self, packed: Mapping[str, Tensor], bits: int, version: int = 2) -> None:
        super().__init__()
        self.bits, self.version = bits, version
        for name, tensor in packed.items():
            self.register_buffer(name, tensor.clone())
        self.infeatures, self.outfeatures = len(self.g_idx), self.scales.shape[1]
        if version == 1:
            self.qzeros -= sum(1 << bits * place for place in range(32 // bits))

    def qzero_format(self) -> int:
        return self.version

    def dequantize_weight(self) -> Tensor:
        """Return the weight, shape (in_features, out_features)."""
        codes = unpack_words(self.qweight.T, self.bits).T.float()
        zeros = unpack_words(self.qzeros, self.bits).float() + (self.version == 1)
        groups = self.g_idx.long()
        return (codes - zeros[groups]) * self.scales.float()[groups]

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.dequantize_weight().to(inputs.dtype)


def live_model(kind: str, folder: Path) -> nn.Module:
    """Return the model in a folder with its linear layers quantized, as they are in a training script."""
    if kind == "bitsandbytes-4":
        config = BitsAndBytesConfig(**NF4().stock_config())
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    if kind == "bitsandbytes-8":
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in linear_layers(model).items():
        model.set_submodule(name, hqq_layer(layer.module) if kind == "hqq" else packed_layer(layer.weight))
    return model


def hqq_layer(linear: nn.Module) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def packed_layer(weight: Tensor, version: int = 2) -> PackedLinear:
    return PackedLinear(Uniform(bits=4, group_size=32).quantize(weight).packed(), 4, version)


def saved_hqq(folder: Path, to: Path) -> Path:
    """Save the model in a folder as hqq saves it, with the layers of `live_model`."""
    model = live_model("hqq", folder)
    to.mkdir()
    save_file(model.state_dict(), to / "model.safetensors")
    model.config.quantization_config = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    model.config.save_pretrained(to)
    return to


def own_weight(kind: str, module: nn.Module) -> Tensor:
    """Return the weight of a layer by its own package."""
    if kind == "bitsandbytes-4":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    if kind == "bitsandbytes-8":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(
            module.weight.data, module.weight.SCB if module.state.SCB is None else module.state.SCB
        )
    if kind == "gptq":
        return module.dequantize_weight().T
    return module.dequantize() if kind == "hqq" else module.weight.dequantize()


def adapted(folder: Path, kind: str = "bitsandbytes-4", model: nn.Module | None = None, **options: Any) -> PeftModel:
    """Return a quantized model with a fresh adapter, as a training script makes it.

    PEFT's layer for GPTQ is asked for by hand, since it looks for layers of gptqmodel.
    """
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "target_modules": EVERY, "task_type": "CAUSAL_LM"} | options)
    config._register_custom_module({PackedLinear: GPTQLoraLinear})
    return get_peft_model(live_model(kind, folder) if model is None else model, config)
