"""Names that layers have in the store of a run."""

from __future__ import annotations

from collections.abc import Iterable

from ..methods.distillation import Distillation
from .fingerprint import digest


def key(method_name: str, layer: str) -> str:
    """Return the name that a layer, as one method made it, has in the store."""
    return f"{method_name}/{layer}" if method_name else layer


def trained_key(key: str) -> str:
    """Return the name that a layer has in the store after the training of its block."""
    return f"trained/{key}"


def distilled_keys(method_name: str, distillation: Distillation, layers: Iterable[str]) -> dict[str, str]:
    """Return the name of each distilled layer in the store."""
    return {layer: key(f"distilled-{digest([repr(distillation)])}", key(method_name, layer)) for layer in layers}


def distilling_key(method_name: str, distillation: Distillation) -> str:
    """Return the name that a distillation has in the store while it is not finished."""
    return key(f"distilling-{digest([repr(distillation)])}", key(method_name, "state"))
