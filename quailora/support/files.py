"""Output files and folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigurationError, OutputExistsError, StorageError
from .choices import StrPath as StrPath  # noqa: PLC0414 # imported from here, too
from .model_files import foreign_to_model

RESULTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base",
    "change",
    "config.yaml",
    "quailora.json",
    "README.md",
    "report.json",
)
"""Everything that `init` writes."""

MODEL_MARK = "merge.json"
"""Says that the folder of a model was written by quailora, so that it may be overwritten on request."""

_UNFINISHED = ".quailora-unfinished"  # in a folder that is being filled


def as_str(path: StrPath | None) -> str | None:
    """Return a path as a string, where there is one."""
    return None if path is None else str(path)


def folder_of(out: StrPath) -> Path:
    """Return the folder that a path means, however it is spelled.

    Raises:
        ConfigurationError: if the path is empty, that of the root, or one that no folder can have.
    """
    if not str(out).strip():
        raise ConfigurationError("Expected a folder for `out`, got an empty path. Name one, such as `out='adapter'`.")
    try:
        folder = Path(out).expanduser().resolve()
        (folder.parent / f".{folder.name}.partial").exists()  # what is written beside the folder has a longer name
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a user that is not there, a name too long
        raise ConfigurationError(f"Expected a folder for `out`, got {str(out)!r}: {error}.") from error
    if folder.parent == folder:
        raise ConfigurationError(f"Expected a folder for `out`, got {folder}. Name a folder inside, such as adapter.")
    return folder


def check_writable(folder: Path) -> None:
    """Raise a `StorageError` unless a folder can be made and written to, by this user, in this place."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise StorageError(f"Expected a folder to write to, but {existing} is a file. Choose another folder.")
    # What is written stands beside the folder until it is complete.
    for written in {existing, existing.parent} if existing == folder else {existing}:
        if not os.access(written, os.W_OK | os.X_OK):
            raise StorageError(f"Expected a place to write to, but {written} is read-only. Choose another folder.")


def check_output(out: Path, overwrite: bool, *, model: bool = False) -> None:
    """Raise an `OutputExistsError` if it is a file or a model's folder, or holds a result that must stay.

    Args:
        out: the folder.
        overwrite: whether a result that is there may be replaced.
        model: whether a model is written, in place of an adapter. It replaces no other files than those of a model that
            quailora has written.
    """
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"Expected a folder to write to, but {out} is a file.")
    if model:
        if out.is_dir() and any(out.iterdir()) and not (overwrite and (out / MODEL_MARK).is_file()):
            advice = " or pass `overwrite=True`" if (out / MODEL_MARK).is_file() else ""
            raise OutputExistsError(f"{out} already holds files. Choose another folder{advice}.")
        foreign = foreign_to_model(out, MODEL_MARK) if out.is_dir() else []
        if foreign:
            raise OutputExistsError(
                f"{out} holds more than a model, {foreign[0]} among it, and is replaced as a whole. Move that away, or "
                "choose another folder."
            )
        return
    if holds_model(out):
        raise OutputExistsError(
            f"{out} is the folder of a model, and an adapter in it would be loaded along with the model. Choose "
            "another folder."
        )
    results = [name for name in RESULTS if (out / name).exists()]
    if results and not overwrite and not (out / _UNFINISHED).exists():
        raise OutputExistsError(
            f"{out} already holds a result ({', '.join(results)}). Choose another folder or pass `overwrite=True`."
        )


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model with its weights."""
    if not (folder / "config.json").is_file():
        return False
    weights = {file.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(pattern)}
    return bool(weights - {"adapter_model.safetensors", "adapter_model.bin"})


@contextmanager
def new_folder(out: Path, overwrite: bool, *, model: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` whose content becomes that of `out` when the body ends without error.

    The new folder takes the place of the old one as a whole, so at any moment one of them is complete. If the body
    fails, `out` is as it was and the temporary folder is gone; what a killed process left is removed at the next call.

    A folder that cannot be renamed, or that holds more than results, is filled instead, and all else in it stays. Its
    `adapter_config.json` goes first and comes last, so that nothing loads a mixture.

    Args:
        out: the folder to make or fill.
        overwrite: replace the results that are there.
        model: whether a model is written, see `check_output`; the folder is replaced as a whole.

    Raises:
        OutputExistsError: if `out` holds a result and `overwrite` is False.
        StorageError: if it cannot be written.
    """
    # Checked twice: before hours of work, and at the end, since another run may have finished in the same folder
    # meanwhile.
    sweep(out)
    check_output(out, overwrite, model=model)
    partial = _beside(out, "new")
    try:
        with storing(out):
            partial.mkdir(parents=True)
        yield partial
        check_output(out, overwrite, model=model)
        with storing(out):
            for file in partial.rglob("*"):
                restore_permissions(file)
                flush(file)
            if not out.exists() or is_replaceable(out, model=model):
                exchange(partial, out)
            elif model:
                raise OSError("the folder is in use or mounted, and cannot be replaced as a whole")
            else:
                fill(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what a killed process left beside a folder, and bring the folder back if it was just being replaced."""
    old, new = _beside(out, "old"), _beside(out, "new")
    with storing(out):
        if old.is_dir() and not out.exists():
            old.rename(out)
        for left in (old, new):
            if left.is_dir():
                shutil.rmtree(left)


def is_replaceable(out: Path, *, model: bool = False) -> bool:
    """Return whether a folder may be replaced as a whole: it holds only results, and is neither mounted nor in use."""
    here = Path.cwd()
    free = not out.is_mount() and out not in (here, *here.parents)
    return free and (model or all(file.name in RESULTS for file in out.iterdir()))


def exchange(new: Path, out: Path) -> None:
    """Let a folder take the place of another one, which is complete until then and is removed after."""
    # Renaming a folder is atomic, replacing one that is not empty is not possible. So the old one steps aside first. A
    # process that is killed between the two renames leaves the old folder, which `sweep` brings back.
    old = _beside(out, "old")
    if out.exists():
        shutil.copymode(out, new)
        out.rename(old)
    new.rename(out)
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link to one, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fill(out: Path, new: Path) -> None:
    """Move results into a folder whose other files stay."""
    # Whoever loads an adapter looks for its configuration. It is the first file to go and the last one to come, so that
    # a process that is killed in between leaves no adapter at all, and a mark which says that the folder may be
    # overwritten.
    # What is new comes into the folder under other names first, so that a full disk leaves the old result as it was.
    staged = {name: out / f".{name}.new" for name in RESULTS}
    try:
        for name, path in staged.items():
            remove(path)  # of a process that was killed
            if (new / name).exists():
                shutil.move(new / name, path)
        (out / _UNFINISHED).touch()
        for name in RESULTS:  # the first one is what makes the others an adapter
            remove(out / name)
        for name in reversed(RESULTS):
            if staged[name].exists():
                staged[name].rename(out / name)
    finally:
        for path in staged.values():
            remove(path)
    flush(out)
    (out / _UNFINISHED).unlink()


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


def flush(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system inside a `with` statement into a `StorageError` that names a path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error}. Make room or choose another place, then run the same command again; what "
            "is finished is kept."
        ) from error


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

    # Written, flushed, renamed, and the folder flushed: after a loss of power the file is either whole or not there.
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
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
