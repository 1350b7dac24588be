"""Score a model on the held-out pairs and on WikiText-2, in nats a token.

The model stays in the mode that it is in: without dropout nothing of the arithmetic differs, except that layers of 8
bits round their inputs to 8 bits in evaluation mode only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from quailora.calibration.capture import has_bfloat16

from .data import HeldOutPair

_BATCH = 8


@torch.no_grad()
def held_out_losses(model: Any, pairs: Sequence[HeldOutPair]) -> dict[str, list[float]]:
    """Return the mean loss of each pair, over all of its tokens but the first, and over those of its response."""
    everything, response = [0.0] * len(pairs), [0.0] * len(pairs)
    by_length = sorted(range(len(pairs)), key=lambda index: len(pairs[index].ids))
    for start in range(0, len(pairs), _BATCH):
        chosen = by_length[start : start + _BATCH]
        for index, losses in zip(chosen, row_losses(model, [pairs[index].ids for index in chosen]), strict=True):
            everything[index] = losses.mean().item()
            response[index] = losses[pairs[index].prompt - 1 :].mean().item()
    return {"all": everything, "response": response}


@torch.no_grad()
def window_losses(model: Any, windows: Tensor) -> list[float]:
    """Return the mean loss of each window."""
    losses = [token_losses(model, part).mean(dim=1) for part in windows.split(4)]
    return torch.cat(losses).tolist()


def row_losses(model: Any, rows: Sequence[Tensor], first: int = 1, *, exact: bool = False) -> list[Tensor]:
    """Return the loss of each token from the `first` on of each row, for rows of any lengths; see `token_losses`."""
    ids = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    losses = token_losses(model, ids, mask, first, exact=exact)
    return [own[: len(row) - first] for own, row in zip(losses, rows, strict=True)]


def token_losses(model: Any, ids: Tensor, mask: Tensor | None = None, first: int = 1, *, exact: bool = False) -> Tensor:
    """Return the loss of each token from the `first` on of each row, (batch, tokens - first).

    It is computed in the arithmetic of training, unless `exact` asks for the dtype of the model. Logits are computed
    where they are needed only: with a large vocabulary they take much of the time.
    """
    device = next(model.parameters()).device
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=not exact and rounds(device)):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first + 1).logits
    return functional.cross_entropy(logits[:, :-1].float().mT, ids[:, first:], reduction="none").cpu()


def rounds(device: torch.device) -> bool:
    """Return whether runs on a device train and are scored under autocast to bfloat16: not on a CPU without it."""
    return device.type != "cpu" or has_bfloat16()
