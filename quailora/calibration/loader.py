"""Tokens of a data loader, taken as the data-driven starts of PEFT take them.

Two functions of the caller may come with the loader: one that calls the model on a batch, and one that says which
tokens of a batch count. The model is not run here: a stand-in for it takes down what it is called with.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..support import distributed
from .enough import Enough
from .tokens import IGNORED_LABEL, CalibrationTokens

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class LoaderReader:
    """Takes tokens out of the batches of a data loader.

    Attributes:
        model: whose `forward` says what arguments that come without a name are.
        forward: called with the model and a batch, as PEFT's `forward_fn`; `model(**batch)` if None.
        prepare: called with a batch and `config`, as PEFT's `prepare_model_inputs_fn`: returns which tokens count, as
            a mask of the shape of `input_ids`, or as pairs of row and column. If None, those count that the attention
            mask and the labels leave.
        config: of the adapter, passed on.
        ignored_label: tokens with this label do not count; all do if None.
    """

    model: Any
    forward: Callable[[Any, Any], Any] | None = None
    prepare: Callable[[Any, Any], Any] | None = None
    config: Any = None
    ignored_label: int | None = IGNORED_LABEL

    def tokens(self, loader: Iterable[Any], enough: Enough) -> CalibrationTokens:
        """Return the sequences in the batches of a loader, without padding.

        Args:
            loader: any iterable of batches.
            enough: no batch is taken after the one with which this is reached; a message says so.

        Raises:
            CalibrationError: if there is no batch, a batch is of another form, or no token counts.
        """
        rows: list[dict[str, Tensor]] = []
        number, run, counted = -1, 0, 0
        for number, batch in enumerate(loader):  # counted afterwards
            if counted >= enough.counted or run >= enough.run:
                logger.warning(
                    "The dataloader holds more than is calibrated on: its first %d batches, %d tokens, are used.",
                    number,
                    run,
                )
                break
            sequences = list(self.rows(batch, number))
            run += sum(row["input_ids"].numel() for row in sequences)
            counted += sum(int((row["labels"] != IGNORED_LABEL).sum()) for row in sequences)
            rows += sequences
        if number < 0:
            raise CalibrationError("Expected batches of tokens, but the dataloader is empty.")
        if not rows:
            raise CalibrationError(
                "Expected tokens that count, but the masks and labels of the dataloader leave none. Tokens with the "
                "label -100 do not count."
            )
        return CalibrationTokens.of_batches(rows)

    def rows(self, batch: Any, number: int) -> Iterator[dict[str, Tensor]]:
        """Yield the sequences of a batch in which a token counts, each as a batch of one row.

        Args:
            batch: of the loader.
            number: of the batch, for messages.
        """
        inputs = self.called_with(batch, number)
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise CalibrationError(
                f"Expected a matrix of token ids as input_ids of batch {number}, got "
                f"{tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__}. Use a collator that returns "
                "tensors, or pass forward_fn to say how the model is called."
            )
        ids = ids.detach().cpu()
        mask = of_shape(inputs.get("attention_mask"), ids, "attention_mask", number)
        counted = self.counted(batch, inputs, ids, number)
        pieces = split_points(inputs.get("position_ids"), ids, mask, number)
        for row, stops in enumerate(pieces):
            for start, stop in pairwise(stops):
                kept, real = counted[row, start:stop], mask[row, start:stop] != 0
                if bool((kept & real).any()):
                    piece = ids[row, start:stop]
                    labels = piece.where(kept, IGNORED_LABEL)
                    yield {"input_ids": piece[None], "attention_mask": real[None], "labels": labels[None]}

    def called_with(self, batch: Any, number: int) -> Mapping[str, Any]:
        """Return the arguments that the model would be called with for a batch, by name."""
        if self.forward is not None:
            return recorded(self.model, self.forward, batch, number)
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"Expected mappings with input_ids as batches, got {type(batch).__name__} as batch {number}. Pass "
                "forward_fn to say how the model is called, such as lambda model, batch: model(batch[0])."
            )
        return batch

    def counted(self, batch: Any, inputs: Mapping[str, Any], ids: Tensor, number: int) -> Tensor:
        """Return which tokens count, as far as labels or the caller's function decide: a mask of the shape of ids."""
        if self.prepare is not None:
            return mask_of(self.prepare(batch, self.config), ids, number)
        labels = inputs.get("labels")
        if self.ignored_label is None or labels is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return of_shape(labels, ids, "labels", number) != self.ignored_label


class _Called(Exception):  # noqa: N818 # not an error
    """The stand-in was called."""


class _StandIn:
    """Takes the place of a model in a function that calls it; everything but calls goes to the model itself."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.arguments: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The caller's function ends here: what the model would compute is not needed, only what it would be called
        # with.
        bound = inspect.signature(self._model.forward).bind_partial(*args, **kwargs).arguments
        self.arguments = {**bound, **bound.get("kwargs", {})}
        raise _Called

    forward = __call__


def recorded(model: Any, forward: Callable[[Any, Any], Any], batch: Any, number: int) -> Mapping[str, Any]:
    """Return what a function calls a model with, by the names of the arguments of `forward`.

    Raises:
        CalibrationError: if it does not call the model.
    """
    stand_in = _StandIn(model)
    with suppress(_Called):
        forward(stand_in, batch)
    if stand_in.arguments is None:
        raise CalibrationError(
            f"Expected forward_fn to call the model that it is given, and for batch {number} it did not. It takes the "
            "model and a batch, such as lambda model, batch: model(**batch)."
        )
    return stand_in.arguments


def of_shape(value: Any, ids: Tensor, name: str, number: int) -> Tensor:
    """Return a tensor beside token ids on the CPU; ones if it is not there.

    Raises:
        CalibrationError: if it is of another shape.
    """
    if value is None:
        return torch.ones_like(ids)
    if not isinstance(value, Tensor) or value.shape != ids.shape:
        raise CalibrationError(
            f"Expected {name} of batch {number} to have the shape {tuple(ids.shape)} of its input_ids, got "
            f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
        )
    return value.detach().cpu()


def mask_of(chosen: Any, ids: Tensor, number: int) -> Tensor:
    """Return as a mask what a `prepare_model_inputs_fn` returns: a mask, or pairs of row and column.

    Raises:
        CalibrationError: if it is something else.
    """
    if isinstance(chosen, Tensor) and chosen.dtype == torch.bool and chosen.shape == ids.shape:
        return chosen.detach().cpu()
    if isinstance(chosen, Tensor) and not chosen.is_floating_point() and chosen.ndim == 2 and chosen.shape[1] == 2:
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[tuple(chosen.detach().cpu().long().T)] = True
        return mask
    got = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
    raise CalibrationError(
        f"Expected prepare_model_inputs_fn to return a boolean mask of shape {tuple(ids.shape)}, or pairs of row and "
        f"column, for batch {number}, got {got}."
    )


def split_points(positions: Any, ids: Tensor, mask: Tensor, number: int) -> list[list[int]]:
    """Return where the sequences of each row start, and where the row ends.

    A row holds several sequences where its `position_ids` begin at 0 again, as collators write them that pack sequences
    one behind the other without padding.

    Raises:
        CalibrationError: if positions neither go on by one nor begin at 0.
    """
    length = ids.shape[1]
    if positions is None:
        return [[0, length] for _ in ids]
    positions = of_shape(positions if getattr(positions, "ndim", 0) == 2 else None, ids, "position_ids", number)
    # Sequences that are packed into one row must not attend to each other, so each is run by itself. Where positions
    # are not consecutive, the row is something else, and running it as consecutive tokens would be wrong.
    starts = []
    for row, real in zip(positions, mask != 0, strict=True):
        begins = (row == 0) & real
        goes_on = torch.cat([torch.zeros(1, dtype=torch.bool), row[1:] == row[:-1] + 1])
        if bool((real & ~begins & ~goes_on).any()):
            raise CalibrationError(
                f"Expected position_ids of batch {number} to count from 0 in each sequence, got {row.tolist()[:16]}. "
                "Leave them out for sequences from their start on."
            )
        places = begins.nonzero().flatten().tolist()
        starts.append([*dict.fromkeys([0, *places]), length])
    return starts


def all_tokens(dataloader: Any, reader: LoaderReader, enough: Enough, *, gather: bool) -> CalibrationTokens:
    """Return the tokens of a loader, the same in every process.

    Args:
        dataloader: of this process.
        reader: takes tokens out of its batches.
        enough: when no more batches are read.
        gather: whether the loaders of several processes have different batches; they are put together in the order in
            which samplers deal them out.
    """
    processes = distributed.world_size()
    if isinstance(dataloader, CalibrationTokens):
        own = dataloader
    else:
        own = reader.tokens(dataloader, enough.share(processes if gather else 1))
    if not gather:
        return distributed.from_first(own)
    # Samplers deal samples out in turns, so taking one of each process in turns restores the order of the data set.
    # Where all processes have the same batches nothing was dealt out, and each token counts once.
    parts = distributed.gather(own)
    if len({part.digest for part in parts}) == 1:
        return parts[0]  # nobody has divided the batches among the processes
    return interleaved(parts)


def interleaved(parts: list[CalibrationTokens]) -> CalibrationTokens:
    """Return the sequences of several processes, the first of each first."""
    longest = max(len(part.sequences) for part in parts)
    pairs = [
        (part.sequences[index], part.counted[index])
        for index in range(longest)
        for part in parts
        if index < len(part.sequences)
    ]
    return CalibrationTokens(tuple(ids for ids, _ in pairs), tuple(counted for _, counted in pairs))
