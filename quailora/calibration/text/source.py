"""Where text comes from, and which of its fields are the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, final

from ...errors import CalibrationError
from .conversation import render, turns_of
from .data_sets import from_folder, from_hub
from .files import ShippedText, reading, shipped_text
from .formats import COMPRESSED, FORMATS, PLAIN, format_of, records_of
from .records import Record

_OWN_FIELDS = ("text", "messages", "conversations", "conversation")
"""Fields that are the text of a record where none are named, the first that is there and not null."""

_SHOWN = 300  # characters of a list of fields


@final
@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        source: a file of records (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`), any other file (plain
            text), a folder of such files, a folder that `save_to_disk` of the package `datasets` wrote, or the hub name
            of a data set, as `name` or `name:configuration`. Files may be compressed by gzip, bzip2, xz or Zstandard.
            None is the text that ships with quailora.
        fields: fields of a record, in order, joined by line breaks into one document; a field that is null or empty is
            left out. By default the field `text`, else a conversation in `messages`, `conversations` or `conversation`.
            Plain text has the one field `text`.
        split: split of a folder or of a data set; a file has only `train`.
        shipped: which of the two shipped texts.
    """

    source: str | None = None
    fields: tuple[str, ...] = ()
    split: str = "train"
    shipped: ShippedText = "calibrate"

    def documents(self, tokenizer: Any = None) -> Iterator[str]:
        """Yield the documents.

        Args:
            tokenizer: a transformers tokenizer, whose chat template makes text of conversations. Without one, or
                without a template, the texts of the turns are joined by line breaks.

        Raises:
            CalibrationError: if the source cannot be read, or a record has not the text that was asked for; the message
                names the line or the record.
        """
        for record in self._records():
            text = self._document(record, tokenizer)
            if text is not None:
                yield text

    def check(self) -> None:
        """Read the first document, so that a source that cannot be read is found before a model is loaded.

        Raises:
            CalibrationError: see `documents`; also if there is no document.
        """
        if next(self.documents(), None) is None:
            raise CalibrationError(
                f"Expected text in {self.source}, but every record of it is empty, or there is none."
            )

    def _records(self) -> Iterator[Record]:
        if self.source is None:
            return iter([Record(shipped_text(self.shipped), "the shipped text")])
        with reading(Path(self.source)):  # a path can be too long, of an unknown user, or not allowed
            path = Path(self.source).expanduser()
            exists, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
        if not self.source.strip() or not (exists or may_be_on_hub(self.source)):
            raise CalibrationError(
                f"Expected a file, a folder or the hub name of a data set, but {self.source!r} does not exist. "
                "Check the path."
            )
        if is_folder:
            return from_folder(path, self.split)
        if not exists:
            return from_hub(self.source, self.split)
        if not is_file:
            raise CalibrationError(
                f"Expected a regular file, but {path} is something else, such as a pipe or a device."
            )
        if self.split != "train":
            raise CalibrationError(
                f"A file has no splits, so there is no {self.split!r} in {path}. Leave the split out, or give a folder."
            )
        return records_of(path)

    def _document(self, record: Record, tokenizer: Any) -> str | None:
        """Return the text of a record, or None if it holds nothing."""
        content = {"text": record.content} if isinstance(record.content, str) else record.content
        if not isinstance(content, dict):
            raise CalibrationError(
                f"Expected a record with named fields, but {record.place} is {kind_of(content)}. A list of records "
                "belongs into a .json file."
            )
        fields = self.fields or own_fields(content)
        missing = next((field for field in fields if field not in content), None)
        if missing is not None or not fields:
            fields_there = ", ".join(map(str, content)) or "none"
            lacking = f"no field {missing!r}" if missing is not None else f"none of the fields {', '.join(_OWN_FIELDS)}"
            raise CalibrationError(
                f"{record.place} has {lacking}. It has: {fields_there[:_SHOWN]}. Name the fields that are the text."
            )
        return self._joined([(field, content[field]) for field in fields], record.place, tokenizer)

    def _joined(self, values: list[tuple[str, Any]], place: str, tokenizer: Any) -> str | None:
        """Return the text of fields; conversations that follow each other are one, as in prompt and completion."""
        values = [(field, value) for field, value in values if value is not None and value != []]
        if not values:
            return None
        # Data sets for fine-tuning have a prompt and a completion as two lists of turns. Rendered one by one, the
        # template would start a new conversation in between, so neighbouring lists are rendered together.
        parts = []
        for are_turns, group in groupby(values, lambda each: turns_of(each[1]) is not None):
            if are_turns:
                parts.append(render([turn for _, value in group for turn in turns_of(value) or ()], tokenizer, place))
                continue
            for field, value in group:
                if not isinstance(value, str):
                    raise CalibrationError(
                        f"Expected text or a conversation in the field {field!r} of {place}, got {kind_of(value)}. "
                        "Name the fields that are the text."
                    )
                parts.append(value)
        text = "\n".join(part for part in parts if part)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CalibrationError(
                f"Expected text, but {place} holds half of a surrogate pair ({text[error.start]!a}), which is no "
                "character. Write the record again with a program that keeps such pairs together."
            ) from error
        return text


def own_fields(content: dict[str, Any]) -> tuple[str, ...]:
    """Return the field that is the text of a record where none are named, or nothing if it has none."""
    present = [field for field in _OWN_FIELDS if field in content]
    return tuple([field for field in present if content[field] is not None][:1] or present[:1])


def may_be_on_hub(source: str) -> bool:
    """Return whether a name can be that of a data set on the hub: `name` or `owner/name`, and no name of a file."""
    path = Path(source)
    is_file = format_of(path) in {*FORMATS, *PLAIN} or path.suffix.lower() in COMPRESSED
    return not (is_file or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1)


def kind_of(value: Any) -> str:
    """Return what a value is, in words."""
    names = {dict: "object", bool: "truth value", int: "number", float: "number", str: "string", list: "list"}
    if isinstance(value, list):
        return f"a list of {names.get(type(value[0]), type(value[0]).__name__)}s" if value else "an empty list"
    name = names.get(type(value), type(value).__name__)
    return f"an {name}" if name == "object" else f"a {name}"
