"""How a stored model is quantized, and the refusal of a quantized model where the full-precision one is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from .checkpoint import StoredTensor
from .files import config_of, find_file, read_json

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Dtypes of weights that are not quantized, as safetensors writes them."""


def quantization_of(name: str) -> dict[str, Any]:
    """Return the `quantization_config` of a model; empty for one that is not quantized.

    Older repositories of AutoGPTQ and AutoAWQ do not have this entry in `config.json` but in a file of its own.

    Args:
        name: hub name or folder.

    Raises:
        ModelError: if a configuration cannot be read, or there is none.
    """
    config = config_of(name)
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        described = section.get("quantization_config") or section.get("compression_config")
        if described:
            return quantization_from(name, described)
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        path = find_file(name, file)
        if path is not None:
            return quantization_from(name, {"quant_method": method, **read_json(path)})
    return {}


def quantization_from(name: str, found: Any) -> dict[str, Any]:
    """Return a `quantization_config` with the method spelled out, and AutoAWQ's names as transformers has them."""
    if not isinstance(found, Mapping):
        raise ModelError(f"Expected the quantization_config of {name!r} to be an object, got {found!r}.")
    config = dict(found)
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # saved before transformers named methods
    for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")):
        if old in config:
            config.setdefault(new, config[old])
    return config | {"quant_method": method if isinstance(method, str) else "an unknown method"}


def check_full_precision(name: str) -> None:
    """Raise a `ModelError` if the configuration of a model, hub name or folder, says that it is quantized."""
    config = quantization_of(name)
    if config:
        raise already_quantized(name, str(config["quant_method"]))


def check_full_precision_weights(name: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise a `ModelError` unless all weights of a model are stored as floating-point numbers of at least 16 bits.

    Args:
        name: hub name or folder.
        tensors: the tensors of its checkpoint.
    """
    for key, tensor in tensors.items():
        if key.endswith("weight") and tensor.dtype not in FLOATS:
            raise already_quantized(name, f"something that stores {key} as {tensor.dtype}")


def already_quantized(name: str, method: str) -> ModelError:
    """Return the error for a model that is quantized where the full-precision one is needed."""
    return ModelError(
        f"{name!r} is quantized already (by {method}), so what quantization lost is not in it. Pass the full-precision "
        "model as `model`, and this one as `base`."
    )
