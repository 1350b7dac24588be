"""The sidecar of an adapter: what it was made from, and for which base."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import Any

from ..errors import ModelError


def read_provenance(adapter: Path) -> dict[str, Any]:
    """Return the sidecar `quailora.json` of an adapter, or an empty dict if the adapter has none.

    Raises:
        ModelError: if there is no adapter in the folder, or the sidecar is damaged.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"Expected an adapter folder with adapter_config.json, but {adapter} has none.")
    sidecar = adapter / "quailora.json"
    if not sidecar.is_file():
        return {}
    try:
        content: dict[str, Any] = loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"The sidecar {sidecar} is damaged: {error}.") from error
    return content
