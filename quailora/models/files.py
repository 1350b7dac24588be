"""Files of a model in a folder or on the hub, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError, first_line


def find_file(name: str, file: str) -> Path | None:
    """Return a file of a folder or of a hub's model, which is fetched if need be; None if there is no such file.

    Raises:
        ModelError: if the hub refuses it.
    """
    from transformers.utils import cached_file

    # Without these flags a file that is not there and a hub that cannot be reached are both errors, but a model may
    # well have no such file, and may lie in the cache.
    try:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise unknown(name, error) from error
    return None if path is None else Path(path)


def unknown(name: str, error: Exception | None = None) -> ModelError:
    """Return the error for a name that means no model, with what the hub says of it, if it says anything."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cause = error.__cause__ if error is not None else None
    if isinstance(cause, GatedRepoError):
        return ModelError(
            f"The hub restricts access to {name!r}. Ask for access on the model's page, then log in: hf auth login."
        )
    reason = "" if error is None or isinstance(cause, RepositoryNotFoundError) else f" ({first_line(error)})"
    return ModelError(
        f"Expected a hub name, a folder, a .gguf file or 'demo', got {name!r}: there is no such folder, and the hub "
        f"has no model of this name, or it cannot be reached{reason}."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ModelError: if it cannot be read, or is no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {file}: {first_line(error)}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"Expected a JSON object in {file}, got {type(content).__name__}. Download or copy it again.")
    return content


def config_of(name: str) -> dict[str, Any]:
    """Return the content of a model's `config.json`; runs no code of the model.

    Args:
        name: hub name or folder.

    Raises:
        ModelError: if there is none, or it is damaged.
    """
    file = find_file(name, "config.json")
    if file is not None:
        return read_json(file)
    if find_file(name, "adapter_config.json") is not None:
        raise ModelError(
            f"Expected a model in {name!r}, but it holds an adapter alone. Pass the model it was made for."
        )
    if Path(name).is_dir():
        raise ModelError(f"Expected a model in the folder {name!r}, but it has no config.json.")
    raise unknown(name)
