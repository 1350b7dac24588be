"""What makes a stored model one that adapters can be initialized from; all else is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError, first_line
from .checkpoint import SAFE, checkpoint_files, config_of, stored_tensors
from .quantized import check_full_precision, check_full_precision_weights

_TRUST = "If you have read that code and trust it, pass --trust-remote-code."


def find_config(model: str, name: str, trust_remote_code: bool) -> Any:
    """Return the configuration of a full-precision causal language model.

    Args:
        model: as it was asked for.
        name: hub name or folder.
        trust_remote_code: run the Python code that the model brings along.

    Raises:
        ModelError: if it cannot be read, is of a quantized model or of another kind, or needs code that is not trusted.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    content = config_of(name)
    check_full_precision(name)
    brought, kind = content.get("auto_map"), str(content.get("model_type"))
    own = isinstance(brought, dict) and not brought.keys().isdisjoint({"AutoConfig", "AutoModelForCausalLM"})
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if own and not known and not trust_remote_code:
        raise ModelError(
            f"{model!r} is a model of the kind {kind!r}, which transformers does not know, and brings Python code of "
            f"its own. {_TRUST}"
        )
    if kind in CONFIG_MAPPING and not known and not own:
        raise ModelError(
            f"Expected a causal language model, but {model!r} is {described(kind, content)}, which is not supported."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(model, error) from error


def described(kind: str, config: Mapping[str, Any]) -> str:
    """Return in words what a model is that is no causal language model."""
    return f"an encoder-decoder ({kind})" if config.get("is_encoder_decoder") else f"a model of the kind {kind!r}"


def check_weights(model: str, name: str, allow_pickle: bool) -> None:
    """Raise a `ModelError` unless the weight files are whole, unquantized, and of a format that is accepted.

    Args:
        model: as it was asked for.
        name: hub name or folder.
        allow_pickle: accept PyTorch's pickle format.
    """
    pickled = [file.name for file in checkpoint_files(name) if not file.name.endswith(SAFE)]
    if not pickled:
        check_full_precision_weights(name, stored_tensors(name))
    elif not allow_pickle:
        raise ModelError(
            f"The weights of {model!r} ({pickled[0]}) are in PyTorch's pickle format, which can run any code while it "
            "is read. If you trust it, pass --allow-pickle."
        )


def check_loaded(model: str, loaded: Any, report: Mapping[str, Any]) -> None:
    """Raise a `ModelError` if weights are missing, or an adapter was loaded along with the model.

    Args:
        model: as it was asked for.
        loaded: what transformers made of it.
        report: what transformers says about loading it.
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
        model: as it was asked for.
        error: of transformers.
        part: what cannot be read: the model or its tokenizer.
    """
    hint = "Expected a causal language model that the installed transformers loads, as a hub name or a folder."
    if part == "tokenizer":
        hint = "Expected the tokenizer's files beside the model's: copy them from the original model."
    if "trust_remote_code" in str(error):
        hint = _TRUST
    return ModelError(f"Cannot load the {part} of {model!r} ({type(error).__name__}: {first_line(error)}). {hint}")
