"""From a text file, a JSONL file or a data set to windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import CalibrationError, ConfigurationError

CalibrationDtype = Literal["auto", "model", "bfloat16"]

_TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".txt"}  # a name that ends so is that of a file, even where there is none
_CHARACTERS_PER_TOKEN = 64  # how much text is read for each token that is needed; the windows are drawn from it


@final
@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        source: a `.jsonl` file (one record a line), any other file (plain text, UTF-8), a folder or the hub name of a
            data set that the package `datasets` can load, as `name` or `name:configuration`; None for the text that
            ships with quailora.
        fields: text fields of a record, in order, joined into one document; for records only.
        split: split of a data set; for data sets only.
    """

    source: str | None = None
    fields: tuple[str, ...] = ("text",)
    split: str = "train"

    def documents(self) -> Iterator[str]:
        """Yield the documents.

        Raises:
            CalibrationError: if the source cannot be read, or a record lacks a field.
        """
        if self.source is None:
            yield shipped_text("calibrate")
            return
        path = Path(self.source).expanduser()
        missing_file = path.suffix in _TEXT_SUFFIXES or path.is_absolute() or self.source.startswith((".", "~"))
        if path.is_dir() or (not path.exists() and not missing_file):
            yield from self._from_data_set()
        elif not path.is_file():
            raise CalibrationError(
                f"Expected a text file, a .jsonl file or the name of a data set, but {self.source!r} does not exist."
            )
        elif path.suffix == ".jsonl":
            yield from self._from_json_lines(path)
        else:
            yield read_text(path)

    def _from_json_lines(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise CalibrationError(f"Expected one JSON object a line; {path}:{number}: {error}.") from error
                yield self._document(record, f"{path}:{number}")

    def _from_data_set(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise CalibrationError(
                f"{self.source!r} is no file here, so it is taken for a data set, which needs the package 'datasets': "
                "pip install 'quailora[data]'."
            ) from error
        name, _, configuration = str(self.source).partition(":")
        try:
            records = load_dataset(name, configuration or None, split=self.split, streaming=True)
            for record in records:
                yield self._document(record, self.source)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"Cannot read split {self.split!r} of the data set {self.source!r} ({error}). "
                "Check the name, or give a local .txt or .jsonl file."
            ) from error

    def _document(self, record: Any, place: str | None) -> str:
        missing = [field for field in self.fields if not isinstance(record, dict) or field not in record]
        if missing:
            there = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise CalibrationError(f"{place} has no field {missing[0]!r}. It has: {there}. Choose the text fields.")
        return "".join(str(record[field]) for field in self.fields)


def shipped_text(name: str) -> str:
    """Return the shipped text `calibrate` or `evaluate`."""
    return files("quailora").joinpath(f"data/{name}.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """Return a UTF-8 file.

    Raises:
        CalibrationError: if it cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"Cannot read {path} as UTF-8 text: {error}.") from error


def tokenize(tokenizer: Any, text: str) -> Int[Tensor, " tokens"]:
    """Return the tokens of a whole text, with the special tokens that the tokenizer adds by itself."""
    if not text.strip():
        return torch.empty(0, dtype=torch.long)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


@final
@dataclass(frozen=True)
class Calibration:
    """Which text calibrates, and which windows of it.

    Attributes:
        text: where the text comes from.
        samples: number of windows.
        sequence_length: tokens in a window.
        seed: seed of the draw.
        dtype: arithmetic of the pass: "auto" is bfloat16 on a CPU that multiplies in it, else that of the model;
            "model" is always that of the model.
    """

    text: TextSource = TextSource()
    samples: int = 16
    sequence_length: int = 1024
    seed: int = 0
    dtype: CalibrationDtype = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.sequence_length < 1:
            raise ConfigurationError(
                f"Expected at least one sample of at least one token, got {self.samples} x {self.sequence_length}."
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Build what `dataclasses.asdict` wrote down, also after a trip through JSON."""
        text = {**content["text"], "fields": tuple(content["text"]["fields"])}
        return cls(**{**content, "text": TextSource(**text)})

    def windows(self, tokenizer: Any) -> Int[Tensor, "samples sequence_length"]:
        """Draw windows of tokens at random, without overlap.

        Documents are joined by blank lines and tokenized as one text, of which at most 64 characters for each needed
        token are read.

        Args:
            tokenizer: a transformers tokenizer.

        Raises:
            CalibrationError: if the text is too short, or cannot be read.
        """
        available = self._every_window(tokenizer, self.samples)
        if len(available) < self.samples:
            raise CalibrationError(
                f"Expected at least {self.samples} x {self.sequence_length} tokens of calibration text, got "
                f"{available.numel()} from {self.text.source or 'the shipped text'}. Use a longer text, fewer samples "
                "or a shorter sequence length."
            )
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(available), generator=generator)[: self.samples].sort().values
        return available[chosen]

    def repeated(self, tokenizer: Any, count: int) -> Int[Tensor, "count sequence_length"]:
        """Draw `count` windows at random, in random order; when all have been drawn, all over again.

        Raises:
            CalibrationError: if the text does not fill `samples` windows, or cannot be read.
        """
        self.windows(tokenizer)
        available = self._every_window(tokenizer, count)
        generator = torch.Generator().manual_seed(self.seed)
        rounds = -(-count // len(available))
        order = torch.cat([torch.randperm(len(available), generator=generator) for _ in range(rounds)])
        return available[order[:count]]

    def _every_window(self, tokenizer: Any, needed: int) -> Int[Tensor, "windows sequence_length"]:
        budget = needed * self.sequence_length * _CHARACTERS_PER_TOKEN
        parts: list[str] = []
        for document in self.text.documents():
            parts.append(document[:budget])
            budget -= len(document)
            if budget <= 0:
                break
        tokens = tokenize(tokenizer, "\n\n".join(parts))
        count = len(tokens) // self.sequence_length
        return tokens[: count * self.sequence_length].view(count, self.sequence_length)


def evaluation_windows(
    tokenizer: Any, texts: Sequence[str], windows: int, sequence_length: int
) -> Int[Tensor, "windows sequence_length"]:
    """Return the first windows of a text, without overlap: the convention of the GPTQ papers.

    Args:
        tokenizer: a transformers tokenizer.
        texts: documents, joined by blank lines.
        windows: number of windows at most; a short text gives fewer.
        sequence_length: tokens in a window.

    Raises:
        CalibrationError: if the text does not fill one window.
        ConfigurationError: if there is to be no window, or a window without a token to predict.
    """
    if windows < 1 or sequence_length < 2:
        raise ConfigurationError(f"Expected at least one window of two tokens, got {windows} x {sequence_length}.")
    tokens = tokenize(tokenizer, "\n\n".join(texts))
    available = min(windows, len(tokens) // sequence_length)
    if available == 0:
        raise CalibrationError(
            f"Expected a text of at least {sequence_length} tokens, got {len(tokens)}. "
            "Use a longer text or a shorter sequence length."
        )
    return tokens[: available * sequence_length].view(available, sequence_length)
