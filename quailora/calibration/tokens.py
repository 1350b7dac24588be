"""The sequences of tokens that a model is calibrated on: windows of a text, or batches that somebody else made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import CalibrationError

_PROBE_TOKENS = 8

TOKENS_PER_PASS = 4096
"""Tokens of a batch, but for sequences that are longer."""

HELD_OUT_EVERY = 4
"""Every fourth sequence is held out, where some are."""

IGNORED_LABEL = -100
"""The label of tokens that do not count, as in PyTorch's cross entropy."""


@final
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences of one length that a model is run on together.

    Attributes:
        ids: token ids.
        counted: the tokens whose inputs go into statistics; all of them if None.
    """

    ids: Int[Tensor, "samples length"]
    counted: Bool[Tensor, "samples length"] | None = None


@final
@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Sequences of tokens without padding.

    Attributes:
        sequences: token ids, each of shape (length).
        counted: for each sequence, the tokens whose inputs go into statistics; all of them where it is None.
    """

    sequences: tuple[Int[Tensor, " _"], ...]
    counted: tuple[Bool[Tensor, " _"] | None, ...]

    def __post_init__(self) -> None:
        if not self.sequences:
            raise CalibrationError("Expected at least one sequence of calibration tokens, got none.")

    @classmethod
    def of_windows(cls, windows: Int[Tensor, "samples length"]) -> CalibrationTokens:
        """Return windows of one length, every token of which counts."""
        return cls(tuple(windows), (None,) * len(windows))

    @classmethod
    def of_batches(cls, batches: Iterable[Mapping[str, Any]]) -> CalibrationTokens:
        """Return the sequences in batches, such as those of a data loader.

        Args:
            batches: mappings with `input_ids` (samples, length); with `attention_mask` of the same shape, whose zeros
                are padding and are cut off; and with `labels` of the same shape, where tokens with the label -100 are
                run but do not count. Sequences in which none counts are left out. Other entries are not used.

        Raises:
            CalibrationError: if a batch has no `input_ids`, shapes do not fit, or a mask has zeros between ones.
        """
        sequences: list[Tensor] = []
        counted: list[Tensor | None] = []
        for number, batch in enumerate(batches):
            for ids, kept in _rows(batch, number):
                sequences.append(ids)
                counted.append(kept)
        if not sequences:
            raise CalibrationError("Expected batches of calibration tokens, got none that has a token which counts.")
        return cls(tuple(sequences), tuple(counted))

    @property
    def tokens(self) -> int:
        """Number of tokens that the model is run on."""
        return sum(map(len, self.sequences))

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """A short hash of all tokens and of which of them count."""
        content = hashlib.sha256()
        for ids, kept in zip(self.sequences, self.counted, strict=True):
            content.update(ids.cpu().numpy().tobytes())
            content.update(b"" if kept is None else kept.cpu().numpy().tobytes())
        return content.hexdigest()[:16]

    def probe(self) -> Int[Tensor, "1 length"]:
        """Return the first few tokens of the first sequence, which are enough for `find_chain`."""
        return self.sequences[0][None, :_PROBE_TOKENS]

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " _"], Bool[Tensor, " _"] | None]]:
        """Yield each sequence, and which of its tokens count."""
        return zip(self.sequences, self.counted, strict=True)

    def batches(self, shares: int, *, hold_out: bool, most: int = TOKENS_PER_PASS) -> tuple[list[TokenBatch], int]:
        """Return batches of sequences of one length, and how many of them come before those that are held out.

        Args:
            shares: how many processes share them; each gets some, where there are enough sequences.
            hold_out: whether every fourth sequence is held out.
            most: tokens in a batch, but for sequences that are longer.

        Raises:
            CalibrationError: if there are too few sequences to hold some out.
        """
        if hold_out and len(self.sequences) < HELD_OUT_EVERY:
            raise CalibrationError(
                f"Expected at least {HELD_OUT_EVERY} calibration samples for asymmetric inputs, of which every "
                f"{HELD_OUT_EVERY}th is held out, got {len(self.sequences)}."
            )
        numbers = range(len(self.sequences))
        held = {number for number in numbers if hold_out and number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1}
        first = self._batched([number for number in numbers if number not in held], shares, most)
        return first + self._batched(sorted(held), shares, most), len(first)

    def _batched(self, numbers: Sequence[int], shares: int, most: int) -> list[TokenBatch]:
        # Sequences of different lengths would need padding, which would cost time and would have to be kept out of the
        # statistics. A batch is also small enough to leave each process a share.
        by_length: dict[int, list[int]] = {}
        for number in numbers:
            by_length.setdefault(len(self.sequences[number]), []).append(number)
        batches = []
        for length, members in by_length.items():
            size = max(1, min(most // length, math.ceil(len(members) / shares)))
            batches += [self._batch(members[start : start + size]) for start in range(0, len(members), size)]
        return batches

    def _batch(self, numbers: Sequence[int]) -> TokenBatch:
        ids = torch.stack([self.sequences[number] for number in numbers])
        masks = [self.counted[number] for number in numbers]
        if all(mask is None for mask in masks):
            return TokenBatch(ids)
        full = [
            torch.ones_like(row, dtype=torch.bool) if mask is None else mask
            for mask, row in zip(masks, ids, strict=True)
        ]
        return TokenBatch(ids, torch.stack(full))


def _rows(batch: Mapping[str, Any], number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the sequences of a batch without their padding, and which tokens count, where some do."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise CalibrationError(
            f"Expected batches with a matrix of token ids as input_ids, got {_described(batch)} as batch {number}. "
            "Pass a data loader whose collator returns tensors."
        )
    ids = ids.detach().cpu()
    masks = {}
    for name in ("attention_mask", "labels"):
        value = batch.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.shape != ids.shape):
            raise CalibrationError(
                f"Expected {name} of batch {number} to have the shape {tuple(ids.shape)} of its input_ids, got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
            )
        masks[name] = None if value is None else value.detach().cpu()
    for row, sequence in enumerate(ids):
        real = torch.ones_like(sequence, dtype=torch.bool)
        if masks["attention_mask"] is not None:
            real = masks["attention_mask"][row] != 0
        # Padding before or behind a sequence is cut off. A mask with zeros in between means several sequences in one
        # row, which attend to each other in ways that only the model's own mask says.
        places = real.nonzero().flatten()
        if len(places) == 0:
            continue
        start, stop = int(places[0]), int(places[-1]) + 1
        if stop - start != len(places):
            raise CalibrationError(
                f"Expected padding before or behind a sequence only, but the attention mask of row {row} of batch "
                f"{number} has zeros between ones. Pass sequences one by one."
            )
        kept = None if masks["labels"] is None else masks["labels"][row, start:stop] != IGNORED_LABEL
        if kept is None or bool(kept.any()):
            yield sequence[start:stop], None if kept is None or bool(kept.all()) else kept


def _described(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(str, batch)) or 'nothing'}"
    return type(batch).__name__
