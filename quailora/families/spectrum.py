"""What families share that train a few entries of a spectrum, at places that PEFT draws from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ConfigurationError, TargetError
from .base import Family


@lru_cache(maxsize=16)
def drawn_places(shape: tuple[int, int], count: int, seed: int) -> Int[Tensor, "2 count"]:
    """Return the rows and columns that PEFT draws from a seed for the entries of a spectrum, in its order.

    Whole numbers in a random order are the same on every machine. Do not change the result in place: it is kept.

    Args:
        shape: `(out_features, in_features)` of the layer.
        count: how many entries.
        seed: PEFT's `random_loc_seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(math.prod(shape), generator=generator, device="cpu")[:count].clone()
    return torch.stack([drawn // shape[1], drawn % shape[1]])


def check_spectrum(n_frequency: int, scaling: float, random_loc_seed: int) -> None:
    """Raise a `ConfigurationError` unless the hyper-parameters of a spectrum are in their ranges."""
    if n_frequency < 1:
        raise ConfigurationError(f"Expected an n_frequency of at least 1, got {n_frequency}.")
    if not 0 < scaling < math.inf:
        raise ConfigurationError(f"Expected a scaling above 0, got {scaling}.")
    if not 0 <= random_loc_seed < 2**63:
        raise ConfigurationError(f"Expected a random_loc_seed from 0 to below 2^63, got {random_loc_seed}.")


def check_room(family: Family, n_frequency: int, shape: tuple[int, int]) -> None:
    """Raise a `TargetError` if a layer has fewer weights than a spectrum has entries."""
    if n_frequency > math.prod(shape):
        raise TargetError(
            f"Expected an n_frequency from 1 to {math.prod(shape)} for {family.name} in a layer of shape {shape}, got "
            f"{n_frequency}."
        )


def equal_share(shapes: Sequence[tuple[int, int]], numbers: int) -> int:
    """Return how many numbers each layer has where all have as many, and all together `numbers` at most."""
    return max(1, min(numbers // len(shapes), *(rows * columns for rows, columns in shapes)))
