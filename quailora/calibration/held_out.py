"""Windows to train on, and others to tell whether the training has helped."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CalibrationError
from .sources import CalibrationSource


def trained_and_held_out(
    source: CalibrationSource, tokenizer: Any, trained: int, held_out: int, length: int
) -> tuple[Int[Tensor, "trained length"], Int[Tensor, "held_out length"]]:
    """Draw windows to train on, and windows that are not among them.

    Args:
        source: what the windows are drawn from.
        tokenizer: a transformers tokenizer.
        trained: number of windows to train on. There are fewer where the text is short, and some may be equal.
        held_out: number of the others at most; all of these are different, and no more than half of the windows.
        length: tokens in a window at most; those of the calibration where they are fewer.

    Raises:
        CalibrationError: if the text has only one window.
    """
    length = min(length, source.size[1])
    drawn = source.training_windows(tokenizer, trained + held_out, length)
    # A short text is drawn from several times, and no window of it may be on both sides.
    different = len(torch.unique(drawn, dim=0))
    if different < 2:
        raise CalibrationError(
            f"Expected at least two different windows of {length} tokens to train on, got one. Calibrate on more text "
            "or on shorter windows."
        )
    others = torch.unique(drawn.flip(0)[:held_out], dim=0)[: different // 2]
    return drawn[~(drawn[:, None] == others).all(-1).any(-1)][:trained], others
