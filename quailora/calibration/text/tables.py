"""Records of tables: CSV, TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from ...errors import CalibrationError
from .files import read_text, reading
from .records import Record, numbered


def from_csv(path: Path) -> Iterator[Record]:
    """Yield the rows of a table with commas, whose first line names the fields; every cell is text."""
    return _separated(path, ",")


def from_tsv(path: Path) -> Iterator[Record]:
    """Yield the rows of a table with tabs, whose first line names the fields; every cell is text."""
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # one for all of Python, so it is set back at once
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        names = list(rows.fieldnames or ())
        if len(set(names)) < len(names):
            raise CalibrationError(f"Expected each field once in the first line of {path}, got {', '.join(names)}.")
        # csv puts superfluous cells under the field None and fills missing ones with None.
        for row in rows:
            if None in row or None in row.values():
                raise CalibrationError(f"Expected {len(names)} cells as in the first line; {path}:{rows.line_num}.")
            records.append(Record(row, f"{path}:{rows.line_num}"))
    except csv.Error as error:
        raise CalibrationError(f"Expected a table with quoted text; {path}:{rows.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    yield from records


def from_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file, one batch in memory at a time; the package `datasets` brings its reader."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _needs_datasets(path) from error
    with reading(path), ParquetFile(path) as file:
        yield from numbered((row for batch in file.iter_batches() for row in batch.to_pylist()), str(path))


def from_arrow(path: Path) -> Iterator[Record]:
    """Yield the rows of an Arrow file, memory-mapped by the package `datasets`."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise _needs_datasets(path) from error
    with reading(path):
        yield from numbered(Dataset.from_file(str(path)), str(path))


def _needs_datasets(path: Path) -> CalibrationError:
    return CalibrationError(
        f"{path} needs the package 'datasets': pip install 'quailora[data]'. Or give a .jsonl file."
    )
