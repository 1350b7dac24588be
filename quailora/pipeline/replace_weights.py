"""Corrections without data for a `PeftModel` in memory, called as PEFT's `replace_lora_weights_loftq` is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..adapters.wrapped import WrappedLayer, warn_of_rounding, wrapped_layers
from ..bases.live import LiveBase
from ..core.metrics import Identity
from ..core.objective import Factors
from ..errors import ConfigurationError, ModelError, named
from ..families.lora import lora_correction
from ..models.single import LayerFiles
from ..quantizers import QuantizedWeight
from ..schedules.layer import difference
from ..solvers import SVD
from .layerwise import seeded


@torch.no_grad()
def replace_lora_weights(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let a LoRA adapter make up for the quantization of the model that it is in, without any data.

    Takes the place of PEFT's `replace_lora_weights_loftq`: same arguments, same order. Beyond bitsandbytes in 4 bits it
    works on its layers of 8 bits and on those of GPTQ, AWQ, HQQ and torchao. It divides PEFT's scaling out, so that any
    `lora_alpha` gives the same correction: the best of its rank, `min ||W - Q - C||_F`, found by a singular value
    decomposition. With text, `quailora.initialize` finds better ones.

    Factors are replaced in place, in float32 where PEFT keeps them so, one layer at a time; of the full-precision
    model only one weight is in memory at any time.

    Args:
        peft_model: a `PeftModel` whose layers are quantized; layers in full precision keep their adapters as they are.
        model_path: the full-precision model: a file whose name ends in `model.safetensors`, its folder, the folder of
            several such files with their index, or a hub name. It can be left out for a model that was loaded by its
            hub name.
        adapter_name: name of the adapter.
        callback: called with the model and the name of a layer after the factors of this layer were replaced. If what
            it returns is false, the former factors are put back.

    Raises:
        TypeError: if the model is no `PeftModel` (`ArgumentTypeError`).
        ValueError: if no layer with this adapter is quantized, there is no such adapter, or the model does not say
            where its full-precision weights are (`ConfigurationError`, `TargetError`).
        FileNotFoundError: if there are no weights at `model_path` (`WeightsNotFoundError`).
        ModelError: if the weights are of another model, quantized too, or damaged; the message names the layer.
    """
    layers = wrapped_layers(peft_model, adapter_name)
    base = LiveBase(peft_model)
    chosen = {name: layer for name, layer in layers.items() if name in base.layers}
    if not chosen:
        raise ConfigurationError(
            f"Expected quantized layers with the adapter {adapter_name!r}, but all {len(layers)} of them are in full "
            "precision, so there is nothing to correct. Load the model with a quantization_config."
        )
    warn_of_rounding(factor for layer in chosen.values() for factor in layer.parameters)
    files = LayerFiles(path_of(peft_model, model_path), peft_model.get_base_model())
    # Running layers in a callback can make bitsandbytes round their scales, so all are read before the first call.
    early = chosen if callback is not None else {}
    held = {name: base.weight(name, files.dtype(name), device_of(chosen[name])) for name in early}
    for name, layer in chosen.items():
        with named(name):
            before = layer.kept()
            layer.accept(lora_correction(correction(files, base, layer, held.pop(name, None))))
        if callback is not None and not callback(peft_model, name):
            layer.restore(before)


def correction(files: LayerFiles, base: LiveBase, layer: WrappedLayer, stored: QuantizedWeight | None) -> Factors:
    """Return the correction of one layer, before PEFT's scaling.

    Args:
        files: files of the full-precision model.
        base: the quantized layers.
        layer: the layer.
        stored: its quantized weight, if it has been read already.

    Raises:
        ModelError: if the two weights are of different shapes.
    """
    weight = files.weight(layer.name).to(device_of(layer))
    if stored is None:
        stored = base.weight(layer.name, weight.dtype, weight.device)
    if stored.shape != tuple(weight.shape):
        raise ModelError(
            f"The weight is of shape {tuple(weight.shape)} in {files.path!r} and of shape {stored.shape} in the "
            "quantized model. These are two different models."
        )
    # min |W - Q - C| over C of rank r is the truncated singular value decomposition of W - Q (Eckart-Young). The seed
    # is for directions without error, which start as in plain LoRA.
    with seeded(layer.name, 0):
        return SVD().solve(difference(weight, stored), Identity(), layer.rank).factors


def device_of(layer: WrappedLayer) -> torch.device:
    """Return where the factors of a layer are, and so the layer itself."""
    return layer.parameters.lora_A.device


def path_of(peft_model: Any, model_path: str | None) -> str:
    """Return where the full-precision weights are, by default the hub name that the model was loaded by.

    Raises:
        ConfigurationError: if the model does not say, or was loaded from a folder, which may hold other weights.
    """
    if model_path is not None:
        return str(model_path)
    config = getattr(peft_model.get_base_model(), "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or Path(name).exists():
        raise ConfigurationError(
            f"Expected a model that was loaded by its hub name, got one from {name or 'no place that it tells'!r}. "
            "Pass the folder or the hub name of the full-precision model as model_path."
        )
    return name
