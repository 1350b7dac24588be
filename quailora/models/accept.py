"""What makes a stored model one that adapters can be initialized from; all else is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ModelError, first_line
from .checkpoint import SAFE, checkpoint_files, stored_tensors
from .files import config_of
from .names import names_in
from .quantized import check_full_precision, check_full_precision_weights

_AUTO = {"AutoConfig", "AutoModelForCausalLM"}
_TRUST = "If you have read that code and trust it, pass `trust_remote_code=True`."


def find_config(model: str, name: str, trust_remote_code: bool) -> Any:
    """Return the configuration of a full-precision causal language model.

    Args:
        model: the model as the caller named it.
        name: hub name or folder.
        trust_remote_code: run the Python code that the model brings along.

    Raises:
        ModelError: if it cannot be read, is of a quantized model or of another kind, or needs code that is not trusted.
    """
    content = config_of(name)
    check_full_precision(name)
    kind, known = str(content.get("model_type")), is_known(content)
    has_code = isinstance(content.get("auto_map"), dict) and not _AUTO.isdisjoint(content["auto_map"])
    if has_code and not known and not trust_remote_code:
        raise ModelError(
            f"{model!r} is a model of the kind {kind!r}, which transformers does not know, and brings Python code of "
            f"its own. {_TRUST}"
        )
    if known is False and not has_code:
        raise ModelError(
            f"Expected a causal language model, but {model!r} is {described(kind, content)}, which is not supported."
        )
    return read_config(model, name, trust_remote_code)


def read_config(model: str, name: str, trust_remote_code: bool) -> Any:
    """Return the configuration of any model; see `find_config`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(model, error) from error


def is_known(config: Mapping[str, Any]) -> bool | None:
    """Return whether transformers has a causal language model for a configuration; None if it has no model at all."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    return CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING if kind in CONFIG_MAPPING else None


def skeleton(model: str, config: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    """Return a model without weights.

    Args:
        model: the model as the caller named it.
        config: configuration of the model.
        trust_remote_code: run the Python code that the model brings along.
        dtype: dtype of the weights; by default the one that the configuration names.

    Raises:
        ModelError: if transformers cannot make it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=trust_remote_code
            ).eval()
    except Exception as error:
        raise unreadable(model, error) from error


def described(kind: str, config: Mapping[str, Any]) -> str:
    """Return in words what a model is that is no causal language model."""
    return f"an encoder-decoder ({kind})" if config.get("is_encoder_decoder") else f"a model of the kind {kind!r}"


def check_weights(model: str, name: str, empty: Any, allow_pickle: bool) -> None:
    """Raise a `ModelError` unless the weight files are whole, unquantized, of the right shapes and an accepted format.

    Args:
        model: the model as the caller named it.
        name: hub name or folder.
        empty: the model without weights.
        allow_pickle: accept PyTorch's pickle format, into which nobody looks here.
    """
    pickled = [file.name for file in checkpoint_files(name) if not file.name.endswith(SAFE)]
    if pickled and not allow_pickle:
        raise ModelError(
            f"The weights of {model!r} ({pickled[0]}) are in PyTorch's pickle format, which can run any code while it "
            "is read. If you trust it, pass `allow_pickle=True`."
        )
    if pickled:
        return
    # transformers initializes tensors of other shapes at random with no more than a warning. Only names that it keeps
    # can be compared; those that it merges or splits are left to its own checks.
    tensors = stored_tensors(name)
    check_full_precision_weights(name, tensors)
    shapes = {key: tuple(parameter.shape) for key, parameter in empty.named_parameters()}
    for key, new in names_in(empty, tensors).items():
        if new in shapes and shapes[new] != tensors[key].shape:
            raise ModelError(
                f"Expected {key} in {tensors[key].file} to have the shape {shapes[new]} that config.json asks for, got "
                f"{tensors[key].shape}. They are of different models."
            )


def check_loaded(model: str, loaded: Any, report: Mapping[str, Any]) -> None:
    """Raise a `ModelError` if weights are missing, or an adapter was loaded along with the model.

    Args:
        model: the model as the caller named it.
        loaded: the model as transformers loaded it.
        report: transformers' own report about loading the model.
    """
    missing = report["missing_keys"]
    if missing:  # transformers would go on with random weights
        raise ModelError(
            f"Expected the checkpoint of {model!r} to have every weight, but it lacks {len(missing)}, {min(missing)} "
            "among them. It is incomplete, or of another kind of model."
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"An adapter was loaded along with {model!r}. Move adapter_config.json out of the model's folder."
        )


def unreadable(model: str, error: Exception, part: str = "model") -> ModelError:
    """Return the error for what transformers cannot read, with the first line of its own message.

    Args:
        model: the model as the caller named it.
        error: the error that transformers raised.
        part: what cannot be read: the model or its tokenizer.
    """
    hint = "Expected a causal language model that the installed transformers loads, as a hub name or a folder."
    if part == "tokenizer":
        hint = "Expected the tokenizer's files beside the model's: copy them from the original model."
    if "trust_remote_code" in str(error):
        hint = _TRUST
    return ModelError(f"Cannot load the {part} of {model!r} ({type(error).__name__}: {first_line(error)}). {hint}")
