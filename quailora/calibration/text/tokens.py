"""From text to tokens, and what a tokenizer adds to a text by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class AddedTokens(NamedTuple):
    """Special tokens that a tokenizer adds to any text.

    Attributes:
        before: ids in front of a text, such as that of the beginning of sequence (BOS).
        after: ids behind it, such as that of the end of sequence (EOS).
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def added_tokens(tokenizer: Any) -> AddedTokens:
    """Return what a tokenizer adds, found by tokenizing a letter with and without special tokens.

    What a tokenizer says of itself (`bos_token`, `add_bos_token`) is not what it does in every case.
    """
    # The letter's own tokens are found inside of the whole; what stands before and after them was added.
    bare, whole = (tuple(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return AddedTokens(whole[:start], whole[start + len(bare) :])
    return AddedTokens((), ())


def tokenize(tokenizer: Any, text: str, *, special: bool = True) -> Int[Tensor, " tokens"]:
    """Return the tokens of a whole text.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text; a text of nothing but spaces has no tokens.
        special: whether to keep the special tokens that the tokenizer adds by itself.
    """
    if not text.strip():
        return torch.empty(0, dtype=torch.long)
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.long)
