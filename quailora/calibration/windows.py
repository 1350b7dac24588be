"""From documents to windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CalibrationError, ConfigurationError
from ..support.choices import BosPlacement as BosPlacement  # noqa: PLC0414 # imported from here, too
from ..support.choices import CalibrationDtype as CalibrationDtype  # noqa: PLC0414 # imported from here, too
from .text import TextSource
from .text.tokens import added_tokens, tokenize

DEFAULT_LENGTH = 1024
"""Tokens in a calibration window, where the model has as many positions."""

_CHARACTERS_PER_TOKEN = 64  # how much text is read for each token that is needed; the windows are drawn from it


@final
@dataclass(frozen=True)
class Calibration:
    """The text to calibrate on, and how windows are drawn from it.

    Attributes:
        text: where the text comes from.
        samples: number of windows.
        sequence_length: tokens in a window; 1024 if None, or all positions that the model has where these are fewer.
        seed: seed of the random draw of windows.
        dtype: arithmetic of the pass: "auto" is bfloat16 on a CPU that multiplies in it, else that of the model;
            "model" is always that of the model.
        bos: "every-window" starts each window with the tokens that the tokenizer puts in front of a text, such as BOS,
            which models expect there; "stream" tokenizes the text as one stream and cuts it, so that only its first
            window has them, as in the GPTQ papers. Without meaning for tokenizers that add none.
    """

    text: TextSource = field(default_factory=TextSource)
    samples: int = 16
    sequence_length: int | None = None
    seed: int = 0
    dtype: CalibrationDtype = "auto"
    bos: BosPlacement = "every-window"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1:
            raise ConfigurationError(
                f"Expected at least one sample of at least one token, got {self.samples} x {self.length}."
            )

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return DEFAULT_LENGTH if self.sequence_length is None else self.sequence_length

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Build what `dataclasses.asdict` wrote down, also after a trip through JSON.

        Files without an entry `bos` are older than this choice, and mean "stream".
        """
        text = {**content["text"], "fields": tuple(content["text"]["fields"])}
        return cls(**{"bos": "stream", **content, "text": TextSource(**text)})

    def windows(self, tokenizer: Any) -> Int[Tensor, "samples sequence_length"]:
        """Draw windows of tokens at random, without overlap.

        Documents are joined by blank lines and tokenized as one text, of which at most 64 characters for each needed
        token are read.

        Args:
            tokenizer: a transformers tokenizer.

        Raises:
            CalibrationError: if the text is too short, or cannot be read.
            ConfigurationError: if special tokens would fill the windows.
        """
        every = self._every_window(tokenizer, self.samples)
        if len(every.ids) < self.samples:
            raise CalibrationError(
                f"Expected at least {self.samples} x {self.length} tokens of calibration text, got "
                f"{every.tokens} from {self.text.source or 'the shipped text'}. Use a longer text, fewer samples "
                "or a shorter sequence length."
            )
        # Sorted, so that windows come in the order of the text whatever the draw was: with several processes, and when
        # a run goes on, each window has the same number.
        return every.ids[random_order(len(every.ids), self.samples, self.seed).sort().values]

    def repeated(self, tokenizer: Any, count: int) -> Int[Tensor, "count sequence_length"]:
        """Draw `count` windows at random, in random order.

        When all have been drawn, the draw starts again with all of them.

        Raises:
            CalibrationError: if the text does not fill `samples` windows, or cannot be read.
            ConfigurationError: if special tokens would fill the windows.
        """
        self.windows(tokenizer)
        available = self._every_window(tokenizer, count).ids
        return available[random_order(len(available), count, self.seed)]

    def other_windows(self, tokenizer: Any, count: int, length: int) -> Int[Tensor, "count length"]:
        """Draw `count` windows with another seed than those of calibration, and no longer ones; see `repeated`."""
        length = min(length, self.length)
        return replace(self, samples=1, sequence_length=length, seed=self.seed + 1).repeated(tokenizer, count)

    def _every_window(self, tokenizer: Any, needed: int) -> _Windows:
        return _windows(tokenizer, self.text.documents(tokenizer), needed, self.length, self.bos)


def random_order(available: int, count: int, seed: int) -> Int[Tensor, " count"]:
    """Return `count` numbers below `available` in random order; all of them come once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = max(1, -(-count // available))
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:count]


def of_one_length(sequences: Sequence[Int[Tensor, " _"]], longest: int) -> Int[Tensor, "windows length"]:
    """Cut sequences into windows of one length, in their order, so that a batch of them needs no padding.

    It is the largest length for which the windows hold at least half of the tokens. What is left of a sequence, and
    shorter sequences, are left out.

    Args:
        sequences: token ids.
        longest: tokens in a window at most.

    Raises:
        CalibrationError: if no sequence has two tokens.
    """
    sizes = [size for size in map(len, sequences) if size > 1]
    lengths = sorted({min(size, longest) for size in sizes}, reverse=True)
    held = ((length, sum(size // length * length for size in sizes)) for length in lengths)
    found = next((length for length, tokens in held if 2 * tokens >= sum(sizes)), 0)
    if not found:
        raise CalibrationError("Expected calibration sequences of at least two tokens to train on, got none.")
    return torch.stack([window for ids in sequences for window in torch.split(ids, found) if len(window) == found])


def evaluation_source(source: str | None, fields: Sequence[str]) -> TextSource:
    """Return a text to evaluate on, by default the one that ships with quailora for that; see `TextSource`."""
    return TextSource(source, tuple(fields), shipped="evaluate")


def given_tokens(tokenizer: Any, bos: BosPlacement) -> int:
    """Return how many tokens at the start of each evaluation window are not predicted.

    These are the special tokens in front of the window, of which some tokenizers have several, and at least its first
    token.
    """
    return max(1, len(added_tokens(tokenizer).before) if bos == "every-window" else 0)


def evaluation_windows(
    tokenizer: Any,
    texts: Iterable[str],
    windows: int,
    sequence_length: int,
    bos: BosPlacement = "every-window",
) -> Int[Tensor, "windows sequence_length"]:
    """Return the first windows of a text, without overlap: the convention of the GPTQ papers, but for `bos`.

    Args:
        tokenizer: a transformers tokenizer.
        texts: documents, joined by blank lines; no more of them are read than are needed, as in `Calibration.windows`.
        windows: number of windows at most; a short text gives fewer.
        sequence_length: tokens in a window.
        bos: see `Calibration`.

    Raises:
        CalibrationError: if the text does not fill one window.
        ConfigurationError: if there is to be no window, or a window without a token to predict.
    """
    if windows < 1 or sequence_length < 2:
        raise ConfigurationError(f"Expected at least one window of two tokens, got {windows} x {sequence_length}.")
    available = _windows(tokenizer, texts, windows, sequence_length, bos)
    if len(available.ids) == 0:
        raise CalibrationError(
            f"Expected a text of at least {sequence_length} tokens, got {available.tokens}. "
            "Use a longer text or a shorter sequence length."
        )
    return available.ids[:windows]


class _Windows(NamedTuple):
    """Every window of a text.

    Attributes:
        ids: token ids.
        tokens: number of tokens of the text; special tokens that are added to each window are not counted.
    """

    ids: Int[Tensor, "windows sequence_length"]
    tokens: int


def _windows(tokenizer: Any, documents: Iterable[str], needed: int, length: int, bos: BosPlacement) -> _Windows:
    """Return at least the first `needed` windows of documents, if they fill as many."""
    front = added_tokens(tokenizer).before if bos == "every-window" else ()
    if length <= len(front):
        raise ConfigurationError(
            f"Expected windows longer than the {len(front)} special tokens that this tokenizer puts in front of each, "
            f"got {length}. Use a longer sequence length."
        )
    # Tokenizing all of a large data set to draw a few windows would take minutes. The budget depends only on what is
    # needed, so the same call reads the same text everywhere.
    budget = needed * length * _CHARACTERS_PER_TOKEN
    parts: list[str] = []
    for document in documents:
        parts.append(document[:budget])
        budget -= len(document)
        if budget <= 0:
            break
    tokens = tokenize(tokenizer, "\n\n".join(parts), special=bos == "stream")
    # The text is cut into pieces that leave room for the special tokens, and these are put in front of each piece. What
    # does not fill a last window is left out, since windows of different lengths would weigh tokens differently.
    free = length - len(front)
    count = len(tokens) // free
    pieces = tokens[: count * free].view(count, free)
    return _Windows(torch.cat([torch.tensor(front, dtype=torch.long).expand(count, -1), pieces], dim=1), len(tokens))
