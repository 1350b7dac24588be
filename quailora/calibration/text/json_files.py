"""Records of JSON: an array, an object that holds one, or an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import CalibrationError
from .files import read_lines, read_text
from .records import Record, numbered


def from_json_lines(path: Path) -> Iterator[Record]:
    """Yield the record of each line that is not blank, one line in memory at a time."""
    for number, line in read_lines(path):
        if line.strip():
            yield Record(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def from_json(path: Path) -> Iterator[Record]:
    """Yield the records of an array, of the one list of records in an object, of a lone object, or of JSON lines."""
    text = read_text(path)
    if not text.strip():
        return
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and is_json(first):
        yield from from_json_lines(path)
        return
    content = _parsed(text, str(path))
    lists = {key: value for key, value in content.items() if is_table(value)} if isinstance(content, dict) else {}
    if isinstance(content, list):
        yield from numbered(content, str(path))
    elif len(lists) == 1 and not any(is_turn(item) for value in lists.values() for item in value):
        ((key, records),) = lists.items()
        yield from numbered(records, f"{path}: {key}")
    else:
        yield Record(content, str(path))


def is_table(value: Any) -> bool:
    """Return whether a value is a list of objects with at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def is_turn(value: Any) -> bool:
    """Return whether a value is one turn of a conversation, in OpenAI's or ShareGPT's names of its parts."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def is_json(text: str) -> bool:
    """Return whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise CalibrationError(
            f"Expected JSON, one record a line in .jsonl and .ndjson files; {place}, {where}: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"Expected JSON; {place}: {error}.") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    # JSON allows a field twice, and Python keeps the last one; a text would be lost without a word.
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the field {twice!r} is there twice in one object")
    return content
