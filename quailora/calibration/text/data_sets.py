"""Records of data sets, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CalibrationError
from .files import read_text, reading
from .formats import FORMATS, PLAIN, format_of, records_of
from .records import Record, numbered, one_line

_SAVED = ("state.json", "dataset_dict.json")  # one of them lies in every folder that `save_to_disk` wrote


def from_hub(source: str, split: str) -> Iterator[Record]:
    """Yield the records of a data set on the hub, as they are fetched; nothing is kept on disk.

    Args:
        source: `name` or `name:configuration`.
        split: the split of the data set to read.

    Raises:
        CalibrationError: if the package `datasets` is missing, or cannot read the data set.
    """
    datasets = _package(source)
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        yield from numbered(rows, source)
    except Exception as error:  # datasets passes on the errors of the hub and of every format
        raise _unreadable(source, split, error) from error


def from_folder(folder: Path, split: str) -> Iterator[Record]:
    """Yield the records of a folder: one that `save_to_disk` wrote, or one of data files.

    The package `datasets` says which files belong to the split, by their names or by the folder's `README.md`. Each is
    then read as if it had been given alone.

    Raises:
        CalibrationError: if the folder or one of its files cannot be read, or files of another kind would be left
            out.
    """
    datasets = _package(str(folder))
    if any((folder / name).is_file() for name in _SAVED):
        yield from _saved(datasets, folder, split)
        return
    # The package knows the rules by which names of files and cards of folders say what belongs to a split. Only these
    # rules are taken from it: its own readers convert types, and would read a file in another way than the same file
    # given alone.
    try:
        configuration = datasets.load_dataset_builder(str(folder.resolve())).config
        by_split = {str(name): [Path(file) for file in listed] for name, listed in configuration.data_files.items()}
    except Exception as error:
        raise _unreadable(str(folder), split, error) from error
    if split not in by_split:
        raise CalibrationError(f"Expected one of the splits {', '.join(by_split)} of {folder}, got {split!r}.")
    if not _describes_itself(folder):
        _check_complete(folder.resolve(), {file.resolve() for files in by_split.values() for file in files})
    for file in by_split[split]:
        yield from records_of(file)


def _describes_itself(folder: Path) -> bool:
    """Return whether the card of a folder says which files are its data."""
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in read_text(card)


def _check_complete(folder: Path, data_files: set[Path]) -> None:
    """Raise a `CalibrationError` if `datasets` found files of other folders, or passes over one for its kind."""
    # The package takes the files of the first kind that it finds and says nothing about others. Half of a folder would
    # be calibrated on without a word, so a mixture is refused.
    if not all(file.is_relative_to(folder) for file in data_files):
        raise CalibrationError(
            f"The package 'datasets' takes [, ], * and ? in {str(folder)!r} for a pattern, which fits other files. "
            "Rename the folder."
        )
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    ]
    readable = [file for file in visible if format_of(file) in {*FORMATS, *PLAIN} and file.name != "README.md"]
    left_out = [file for file in readable if file.resolve() not in data_files]
    if left_out:
        raise CalibrationError(
            f"Expected a folder with files of one kind, but {folder} has {min(data_files).name} and "
            f"{left_out[0].name}, and only those of the first kind would be read. Give a single file, or a folder for "
            "each kind."
        )


def _saved(datasets: Any, folder: Path, split: str) -> Iterator[Record]:
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _unreadable(str(folder), split, error) from error
    if isinstance(rows, dict):
        if split not in rows:
            raise CalibrationError(f"Expected one of the splits {', '.join(rows)} of {folder}, got {split!r}.")
        rows = rows[split]
    elif split != "train":
        raise CalibrationError(
            f"{folder} holds one table and no splits, so there is no {split!r}. Leave the split out."
        )
    with reading(folder):
        yield from numbered(rows, str(folder))


def _package(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{source!r} is no file here, so it is taken for a data set, which needs the package 'datasets': "
            "pip install 'quailora[data]'."
        ) from error
    return datasets


def _unreadable(source: str, split: str, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"Cannot read split {split!r} of the data set {source!r} ({one_line(error)}). Check the name, or give a local "
        ".txt or .jsonl file."
    )
