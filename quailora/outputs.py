"""Output files and folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import OutputExistsError, StorageError

StrPath = str | Path
"""A path, or the name of something on the hub, as callers give it."""

RESULTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base",
    "config.yaml",
    "quailora.json",
    "README.md",
    "report.json",
)
"""Everything that `init` writes."""


def as_str(path: StrPath | None) -> str | None:
    """Return a path as a string, where there is one."""
    return None if path is None else str(path)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise an `OutputExistsError` if it is a file or a model's folder, or holds a result that must stay."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"Expected a folder to write to, but {out} is a file.")
    if holds_model(out):
        raise OutputExistsError(
            f"{out} is the folder of a model, and an adapter in it would be loaded along with the model. Choose "
            "another folder."
        )
    there = [name for name in RESULTS if (out / name).exists()]
    if there and not overwrite:
        raise OutputExistsError(
            f"{out} already holds a result ({', '.join(there)}). Choose another folder or pass --overwrite."
        )


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model with its weights."""
    if not (folder / "config.json").is_file():
        return False
    weights = {file.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(pattern)}
    return bool(weights - {"adapter_model.safetensors", "adapter_model.bin"})


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `out` whose content becomes that of `out` when the body ends without error.

    Files of `out` that are no results stay. If the body fails, `out` is as it was and the temporary folder is gone.

    Args:
        out: the folder to make or fill.
        overwrite: replace the results that are there.

    Raises:
        OutputExistsError: if `out` holds a result and `overwrite` is False.
    """
    check_output(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        check_output(out, overwrite)
        out.mkdir(exist_ok=True)
        for name in RESULTS:
            restore_permissions(partial / name)
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            if (partial / name).exists():
                (partial / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def restore_permissions(path: Path) -> None:
    """Give a file the permissions of any new file; safetensors and temporary files are private to the user."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes `path` when the body ends without error, and is removed otherwise.

    Raises:
        StorageError: if it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write {path}: {error}. Make room, then run the same command again; what is finished is kept."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it when it is complete."""
    with complete_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name and rename it when it is complete."""
    from safetensors.torch import save_file

    with complete_file(path) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
