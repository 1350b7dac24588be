"""The files of a model that quailora has written."""

from __future__ import annotations

from pathlib import Path

_MODEL_FILES = (
    "*config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "*.py",
    "README.md",
)


def foreign_to_model(folder: Path, mark: str) -> list[str]:
    """Return the names of files and folders that are none of a model; `mark` is a file that one of quailora has."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() or not any(path.match(pattern) for pattern in (*_MODEL_FILES, mark))
    )
