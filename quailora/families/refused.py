"""Families of PEFT that cannot carry a correction on a quantized base, with the reasons, and families by name."""

from __future__ import annotations

from ..errors import ConfigurationError
from ..support.choices import did_you_mean
from ..support.settings import find_class, short_name, subclasses
from .base import Family

_FLOAT_ONLY = "stock PEFT computes it on weights in floating point only, and fails on bases of bitsandbytes"
_CODES = "stock PEFT takes the integer codes of an int8 base for its weights, and fails on a base of 4 bits"
_SHARED = "its parameters are shared by layers, so that no layer by itself has a correction; train it as it is"
_PROMPT = "it changes the inputs of the model and no weight, so that it cannot make up for the error of a layer"

REFUSED: dict[str, str] = {
    "delora": _FLOAT_ONLY,
    "psoft": _FLOAT_ONLY,
    "tinylora": _FLOAT_ONLY,
    "osf": _FLOAT_ONLY,
    "glora": _FLOAT_ONLY,
    "frod": _FLOAT_ONLY,
    "hra": _CODES,
    "peanut": _CODES,
    "deft": _CODES,
    "vblora": _SHARED,
    "unilora": _SHARED,
    "lily": _SHARED,
    "oft": "it rotates the inputs of a layer, for which there is no fit here yet; take lora, dora or ia3",
    "boft": "it rotates the inputs of a layer, for which there is no fit here yet; take lora, dora or ia3",
    "ln_tuning": "it trains the weights of norms, which several layers share; take beft, ia3 or lora",
    "xlora": "it mixes adapters that are there already; initialize each of them by itself",
    "poly": "it mixes several adapters by tasks; take lora",
    "prompt_tuning": _PROMPT,
    "prefix_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "cpt": _PROMPT,
    "multitask_prompt_tuning": _PROMPT,
    "adaption_prompt": _PROMPT,
    "trainable_tokens": "it trains embeddings, which are not quantized",
}
"""PEFT's methods that have no start here, by their names in lower case, with the reason."""


def find_family(name: str) -> type[Family]:
    """Return the class of a family by its name, or by its import path if it is imported.

    Raises:
        ConfigurationError: if there is none of this name; the message has the reason where PEFT knows the name.
    """
    found = find_class(Family, name)  # type: ignore[type-abstract]
    if found is not None:
        return found
    names = [short_name(cls) for cls in subclasses(Family) if short_name(cls)]  # type: ignore[type-abstract]
    reason = REFUSED.get(name.lower().replace("-", "_"))
    if reason is not None:
        raise ConfigurationError(f"There is no start for {name!r}: {reason}. Families are {', '.join(names)}.")
    raise ConfigurationError(f"Unknown family {name!r}. Expected one of {', '.join(names)}.{did_you_mean(name, names)}")
