"""What a model can be run on: how many positions, and which token ids."""

from __future__ import annotations

import logging
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError

logger = logging.getLogger("quailora")


def longest_sequence(model: Any) -> int | None:
    """Return the number of positions of a model, or None if it has no limit.

    A table of learned positions with a padding index starts to count behind that index, as `torch.nn.Embedding` keeps
    its row at zero; so a model may have fewer positions than its configuration says.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None or longest < 1:  # some configurations say -1 for no limit
        return None
    offsets = [
        module.padding_idx + 1
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and module.padding_idx is not None
        if module is not model.get_input_embeddings()
    ]
    return int(longest) - max(offsets, default=0)


def check_sequence_length(model: Any, sequence_length: int) -> None:
    """Raise a `ModelError` if the model has no positions for sequences of this length."""
    longest = longest_sequence(model)
    if longest is not None and sequence_length > longest:
        raise ModelError(
            f"Expected a sequence length of at most {longest} for this model, got {sequence_length}. Use a shorter one."
        )


def fitting_length(model: Any, asked: int | None, default: int) -> int:
    """Return the sequence length that was asked for, or as much of a default as the model has positions for.

    Raises:
        ModelError: if the model has no positions for the length that was asked for.
    """
    if asked is not None:
        check_sequence_length(model, asked)
        return asked
    longest = longest_sequence(model)
    if longest is not None and longest < default:
        logger.info("Windows have %d tokens, since this model has no more positions.", longest)
        return longest
    return default


def check_token_ids(
    model: Any, windows: Int[Tensor, "samples sequence_length"]
) -> Int[Tensor, "samples sequence_length"]:
    """Return windows of token ids after checking that the model has an embedding for each id.

    Raises:
        CalibrationError: if there is a token id that the model's embedding has no row for.
    """
    rows = len(model.get_input_embeddings().weight)
    largest = int(windows.max())
    if largest >= rows:
        raise CalibrationError(
            f"Expected token ids below {rows}, the number of rows of this model's embedding, but its tokenizer gives "
            f"the id {largest} to a token of this text. Put the tokenizer that belongs to the model into its folder, "
            "or resize the model's embedding to the tokenizer with resize_token_embeddings()."
        )
    return windows
