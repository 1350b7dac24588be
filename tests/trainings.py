"""Adapters that stock PEFT has changed as training does, and the weights that it computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def train(initial: Path, folder: Path, base: Any = None, *, by: float = 0.05, seed: int = 1) -> Any:
    """Change everything that an adapter trains, save it as training does, and return the model.

    Args:
        initial: folder of the adapter before training.
        folder: folder for the trained one.
        base: the model that it is trained on; the one that its configuration names by default.
        by: size of the change, relative to that of each tensor.
        seed: seed of the change.
    """
    config = json.loads((initial / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]) if base is None else base
    model = PeftModel.from_pretrained(base, str(initial), is_trainable=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(
                    noise.to(parameter), alpha=by * (parameter.norm() / parameter.numel() ** 0.5 + 0.01).item()
                )
    model.save_pretrained(folder)
    return model


def effective_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weight of each layer with an adapter, by the outputs of PEFT's own layers for unit vectors."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            width = module.base_layer.in_features
            with torch.no_grad():
                found[name] = (module(torch.eye(width)) - module(torch.zeros(1, width))).T
    return found
