"""Which runs the experiment consists of, most important first. Later ones depend on what earlier ones have shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from .arms import FAMILY_ARMS
from .protocol import Protocol, Run

MAIN = ("int8", "qlora", "best-frozen", "best", "best-joint-frozen", "distilled-frozen", "distilled-joint-frozen")
"""Arms whose best rate is searched for first."""

STARTS = (
    "best-half",
    "best-twice",
    "best-joint-twice",
    "best-joint-four",
    "distilled-joint-twice",
    "best-slow-a",
    "best-scaled",
    "best-input-power",
    "best-decay",
)
"""Other ways to train a start, at the two rates in the middle of the grid and beyond if the best is at an edge."""

REST = ("full", "quailora", "loftq", "distilled", "best-joint", "distilled-joint", "quailora-frozen", "loftq-frozen")
"""Arms that complete the table."""

BY_RANK = ("int8", "qlora", "best-frozen", "best", "best-joint-frozen")
"""Arms that are run at all ranks."""

Row = Mapping[str, Any]
Results = Sequence[Row]


def outstanding(protocol: Protocol, results: Results, device: str, *, families: bool = False) -> list[Run]:
    """Return the runs that are still to be carried out, in order.

    Args:
        protocol: the protocol.
        results: all results, on any device.
        device: name of the device that they are carried out on.
        families: the runs that compare families of adapters, in place of those that compare starts of LoRA.
    """
    done = {row["key"] for row in results if row["device"] == device}
    seen: dict[str, Run] = {}
    for run in (planned_families if families else planned)(protocol, results):
        seen.setdefault(run.key, run)
    return [run for key, run in seen.items() if key not in done]


def planned(protocol: Protocol, results: Results) -> Iterator[Run]:
    """Yield all runs that can be planned today; those at the best rate of an arm once the rate is known."""
    rank = reference_rank(protocol)
    yield from search(protocol, results, rank)
    yield from with_seeds(protocol, results, (*MAIN, "best-joint", "distilled", "quailora"), rank)
    for other in protocol.ranks:
        if other != rank:
            yield from at_rates(protocol, BY_RANK, other, from_the_middle(protocol)[:3])
            yield from with_seeds(protocol, results, BY_RANK, other)
    rate = best_rate(results, "best", rank)
    if rate is not None:
        yield from (Run("best-recalibrated", rank, rate, seed, curve=True) for seed in protocol.seeds)
    for arm in ("best-frozen", "best"):
        rate = best_rate(results, arm, rank)
        if rate is not None:
            yield from (Run(arm, rank, rate, seed, text) for text in ("wikitext2", "c4") for seed in protocol.seeds)
    yield from everything(protocol, rank)


FAMILY_RATES = (8e-4, 1.6e-3, 3.2e-3)
"""Learning rates that every family is tried with at first; others follow where the best is at an edge."""


def planned_families(protocol: Protocol, results: Results) -> Iterator[Run]:
    """Yield the runs that compare stock starts of other families than LoRA with fitted ones; LoRA is among them."""
    rank, arms = reference_rank(protocol), ("qlora", "best", *FAMILY_ARMS)
    for rate in FAMILY_RATES:
        yield from (Run(arm, rank, rate, protocol.seeds[0], curve=True) for arm in arms)
    for arm in arms:
        yield from beyond_the_edge(protocol, results, arm, rank)
    for seed in protocol.seeds[1:2]:
        best = ((arm, best_rate(results, arm, rank)) for arm in arms)
        yield from (Run(arm, rank, rate, seed, curve=True) for arm, rate in best if rate is not None)


def everything(protocol: Protocol, rank: int) -> Iterator[Run]:
    """Yield all arms at all rates with all seeds, for which there is time on a GPU."""
    rates = from_the_middle(protocol)
    for seed in protocol.seeds:
        for rate in rates[:4]:
            yield from (Run(arm, rank, rate, seed, curve=True) for arm in (*MAIN, *STARTS, *REST))
    for other in protocol.ranks:
        if other != rank:
            yield from (
                Run(arm, other, rate, seed, curve=True)
                for rate in rates[:4]
                for seed in protocol.seeds
                for arm in BY_RANK
            )
    for seed in protocol.seeds:
        yield from (Run(arm, rank, rate, seed, curve=True) for rate in rates[4:] for arm in (*MAIN, *REST))


def search(protocol: Protocol, results: Results, rank: int) -> Iterator[Run]:
    """Yield the runs that look for the best rate of each arm, with the first seed."""
    rates = from_the_middle(protocol)
    yield from at_rates(protocol, (*MAIN, *STARTS), rank, rates[:2])
    for arm in (*MAIN, *STARTS):
        yield from beyond_the_edge(protocol, results, arm, rank)
    yield from at_rates(protocol, MAIN, rank, rates[2:])
    yield from at_rates(protocol, REST, rank, rates)
    for arm in REST:
        yield from beyond_the_edge(protocol, results, arm, rank)


def at_rates(protocol: Protocol, arms: Sequence[str], rank: int, rates: Sequence[float]) -> Iterator[Run]:
    """Yield a run of each arm at each rate, with the first seed."""
    yield from (Run(arm, rank, rate, protocol.seeds[0], curve=True) for rate in rates for arm in arms)


def from_the_middle(protocol: Protocol) -> list[float]:
    """Return the rates from the middle of the grid outwards, so that the best is seen early."""
    middle = (len(protocol.rates) - 1) / 2
    return sorted(protocol.rates, key=lambda rate: abs(protocol.rates.index(rate) - middle - 0.1))


def with_seeds(protocol: Protocol, results: Results, arms: Sequence[str], rank: int) -> Iterator[Run]:
    """Yield the runs of arms at their best rates with every seed, with a curve."""
    for arm in arms:
        rate = best_rate(results, arm, rank)
        if rate is not None:
            yield from (Run(arm, rank, rate, seed, curve=True) for seed in protocol.seeds[1:])


def beyond_the_edge(protocol: Protocol, results: Results, arm: str, rank: int) -> Iterator[Run]:
    """Yield a run at half or twice the rates that were tried, if the best of them is the lowest or the highest."""
    tried = sorted(by_rate(results, arm, rank))
    best = best_rate(results, arm, rank)
    if best is not None and len(tried) >= 2:
        if best == tried[0]:
            yield Run(arm, rank, best / 2, protocol.seeds[0], curve=True)
        if best == tried[-1]:
            yield Run(arm, rank, best * 2, protocol.seeds[0], curve=True)


def best_rate(results: Results, arm: str, rank: int) -> float | None:
    """Return the rate of the lowest held-out loss for the first seed; None before any run."""
    losses = by_rate(results, arm, rank)
    return min(losses, key=losses.__getitem__) if losses else None


def by_rate(results: Results, arm: str, rank: int) -> dict[float, float]:
    """Return the loss of an arm at each rate, for the first seed; the mean over devices."""
    wanted = {"arm": arm, "rank": rank, "seed": 0, "calibration": "train"}
    losses: defaultdict[float, list[float]] = defaultdict(list)
    for row in results:
        if wanted.items() <= row.items():
            losses[row["rate"]].append(fmean(row["after"]["all"]))
    return {rate: fmean(every) for rate, every in losses.items()}


def reference_rank(protocol: Protocol) -> int:
    """Return the rank at which everything is tried."""
    return 16 if 16 in protocol.ranks else protocol.ranks[0]
