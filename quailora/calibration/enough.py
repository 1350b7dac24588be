"""When a data loader has given enough tokens to calibrate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

MOST_TOKENS = 131_072
"""Tokens after which no more is read, whether or not they count; eight times those of `quailora init`."""

TOKENS_PER_INPUT = 16
"""Tokens that are enough for each input of the widest layer. In docs/worth.md, 11 were as good as 43."""


@final
@dataclass(frozen=True)
class Enough:
    """When a data loader has given enough: as soon as it has given either number of tokens.

    Attributes:
        counted: tokens that count.
        run: tokens that the model is run on, which include those that do not count.
    """

    counted: int
    run: int

    @classmethod
    def of(cls, widest: int, *, distilled: bool) -> Enough:
        """Return what is enough for a model.

        A second moment of n inputs is estimated from N tokens with an error that falls with N / n, so that models with
        wider layers need more tokens. Distillation trains on the tokens, and has all that are there.

        Args:
            widest: number of inputs of the widest layer.
            distilled: whether the corrections are distilled.
        """
        return cls(MOST_TOKENS if distilled else min(MOST_TOKENS, TOKENS_PER_INPUT * widest), MOST_TOKENS)

    def share(self, processes: int) -> Enough:
        """Return what is enough from each of several processes."""
        return Enough(-(-self.counted // processes), -(-self.run // processes))
