"""Random projections that are in the file of an adapter."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import uniform
from ..errors import ConfigurationError

_STEPS = 128  # values on either side of zero: bfloat16 and float16 hold them exactly


def drawn_rows(length: int, width: int, seed: int) -> Float[Tensor, "length width"]:
    """Return numbers drawn evenly from -1 to 1, in float32; the first rows are the same for every length.

    Models of float32, bfloat16 and float16 hold exactly these numbers, and their products with a power of two.
    """
    # They are drawn one after the other, row by row, so that further rows leave the first ones as they are.
    return (uniform((length, width), torch.empty(0, dtype=torch.float32), seed) * _STEPS).round() / _STEPS


def check_key(projection_prng_key: int) -> None:
    """Raise a `ConfigurationError` unless a seed leaves room for one seed to each projection."""
    if not 0 <= projection_prng_key < 2**32:
        raise ConfigurationError(f"Expected a projection_prng_key from 0 to below 2^32, got {projection_prng_key}.")
