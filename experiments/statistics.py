"""Differences and shares with intervals, over held-out pairs and seeds at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_RESAMPLES = 4000
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the number over all pairs and seeds.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def bootstrapped(statistic: Callable[..., np.ndarray], *losses: Sequence[Sequence[float]]) -> Estimate:
    """Return a statistic of mean losses with a percentile bootstrap over pairs and over seeds.

    The same pairs and the same seeds are drawn for all arms, since all of them saw the same pairs and, for a seed, the
    same batches. With one seed the interval is over pairs alone, and says nothing of other seeds.

    Args:
        statistic: called with the mean losses of the arms, an array over resamples for each.
        losses: losses of each arm, (seeds, pairs), with seeds and pairs in the same order.
    """
    arms = [np.asarray(part, dtype=float) for part in losses]
    shapes = {part.shape for part in arms}
    if len(shapes) != 1:
        raise ValueError(f"Expected losses of the same seeds and pairs in all arms, got {sorted(shapes)}.")
    by_seed, by_pair = _resamples(*arms[0].shape)
    draws = statistic(*(np.einsum("ns,sp,np->n", by_seed, part, by_pair, optimize=True) for part in arms))
    value = statistic(*(part.mean(keepdims=True)[0] for part in arms))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(value[0]), float(low), float(high))


@cache
def _resamples(seeds: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each seed and of each pair in each resample."""
    generator = np.random.default_rng(0)
    return tuple(generator.multinomial(size, [1 / size] * size, _RESAMPLES) / size for size in (seeds, pairs))


def gap_closed(plain: np.ndarray, eight_bits: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """Return the share of the distance from NF4 with plain LoRA to int8 with plain LoRA that an arm closes."""
    return (plain - arm) / (plain - eight_bits)


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the loss of the first less that of the second."""
    return first - second
