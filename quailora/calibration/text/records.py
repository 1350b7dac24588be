"""A record, and how messages name it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One record.

    Attributes:
        content: a string for plain text; else what the format holds, a dictionary of fields as a rule.
        place: file and line, or file and number, for messages.
    """

    content: Any
    place: str


def numbered(rows: Iterable[Any], place: str) -> Iterator[Record]:
    """Yield rows as records that are named by their number."""
    for number, row in enumerate(rows, 1):
        yield Record(row, f"{place}, record {number}")


def one_line(error: Exception) -> str:
    """Return the message of an error in one line and without its full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
