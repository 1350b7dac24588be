"""The format of a file, found from its name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from .files import read_text
from .json_files import from_json, from_json_lines, is_json
from .records import Record
from .tables import from_arrow, from_csv, from_parquet, from_tsv

logger = logging.getLogger("quailora")

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of names that come after the ending of the format."""

FORMATS = {
    ".json": from_json,
    ".jsonl": from_json_lines,
    ".ndjson": from_json_lines,
    ".csv": from_csv,
    ".tsv": from_tsv,
    ".parquet": from_parquet,
    ".arrow": from_arrow,
}
"""Readers by the ending of a file's name."""

PLAIN = (".txt", ".md")
"""Endings of plain text; so is any other that `FORMATS` does not have."""


def format_of(path: Path) -> str:
    """Return the ending that names a file's format, in lower case and without the ending of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def records_of(path: Path) -> Iterator[Record]:
    """Yield the records of a file; a file of an unknown format is plain text, one record.

    Raises:
        CalibrationError: if the file cannot be read in its format; the message names the line where there is one.
    """
    return FORMATS.get(format_of(path), _from_plain_text)(path)


def _from_plain_text(path: Path) -> Iterator[Record]:
    text = read_text(path)
    first = text.lstrip().partition("\n")[0]
    if first.startswith(("{", "[{")) and is_json(first):
        logger.warning("%s is read as plain text, but looks like records. For their fields, name it .jsonl.", path)
    yield Record(text, str(path))
