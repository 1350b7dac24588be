"""Tables of the experiment, as Markdown, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from quailora.support.tables import markdown_table

from .arms import ARMS
from .plan import Results, best_rate
from .statistics import Estimate, bootstrapped, difference, gap_closed

Row = Mapping[str, Any]

_PARTS = ("all", "response", "wikitext2")


def chosen(results: Results, arm: str, rank: int, rate: float | None, calibration: str = "train") -> dict[int, Row]:
    """Return the results of an arm at a rate, by seed."""
    wanted = {"arm": arm, "rank": rank, "rate": rate, "calibration": calibration}
    return {
        row["seed"]: row for row in sorted(results.values(), key=lambda r: r["seed"]) if wanted.items() <= row.items()
    }


def at_best(results: Results, arm: str, rank: int, calibration: str = "train") -> dict[int, Row]:
    """Return the results of an arm at its own best rate, by seed."""
    return chosen(results, arm, rank, best_rate(results, arm, rank), calibration)


def losses(rows: Mapping[int, Row], seeds: Sequence[int], part: str = "all") -> list[list[float]]:
    """Return losses after training, (seeds, pairs)."""
    return [rows[seed]["after"][part] for seed in seeds]


def common(*rows: Mapping[int, Row]) -> list[int]:
    """Return the seeds that all arms have."""
    return sorted(set.intersection(*(set(part) for part in rows)))


def gap_of(results: Results, arm: str, rank: int, part: str = "all", calibration: str = "train") -> Estimate | None:
    """Return the share of the gap between NF4 and int8 that an arm closes, at its best rate; None if unknown."""
    rows = at_best(results, "qlora", rank), at_best(results, "int8", rank), at_best(results, arm, rank, calibration)
    seeds = common(*rows)
    return bootstrapped(gap_closed, *(losses(each, seeds, part) for each in rows)) if seeds else None


def main_table(results: Results, rank: int) -> str:
    """Return the arms, each at its own best rate."""
    lines = []
    for name, arm in ARMS.items():
        rows = at_best(results, name, rank)
        if not rows:
            continue
        shares = [gap_of(results, name, rank, part) for part in ("all", "response")]
        lines.append([
            arm.title,
            f"{next(iter(rows.values()))['rate']:g}",
            str(len(rows)),
            f"{mean(rows, 'all'):.4f}",
            *(percent(share) if name not in {"qlora", "int8"} else "" for share in shares),
            f"{math.exp(mean(rows, 'wikitext2')):.2f}",
        ])
    header = ["arm", "best rate", "seeds", "held-out loss", "gap closed", "of the response", "WikiText-2 perplexity"]
    return markdown_table(header, lines)


def rate_table(results: Results, rank: int) -> str:
    """Return the loss of each arm at each rate less that of QLoRA at the same rate, for the seeds that both have."""
    rates = sorted({row["rate"] for row in results.values() if row["rank"] == rank})
    lines = []
    plain = {rate: chosen(results, "qlora", rank, rate) for rate in rates}
    lines.append([
        "NF4, QLoRA: the loss",
        *(f"{mean(plain[rate], 'all'):.4f}" if plain[rate] else "" for rate in rates),
    ])
    for name, arm in ARMS.items():
        if name == "qlora":
            continue
        cells = []
        for rate in rates:
            rows = chosen(results, name, rank, rate)
            seeds = common(rows, plain[rate])
            cells.append(
                signed(bootstrapped(difference, losses(rows, seeds), losses(plain[rate], seeds))) if seeds else ""
            )
        if any(cells):
            lines.append([arm.title, *cells])
    return markdown_table(["arm", *(f"{rate:g}" for rate in rates)], lines)


def rank_table(results: Results, ranks: Sequence[int], arms: Sequence[str]) -> str:
    """Return the share of the gap that arms close at each rank."""
    lines = [[ARMS[arm].title, *(percent(gap_of(results, arm, rank)) for rank in ranks)] for arm in arms]
    return markdown_table(["arm", *(f"rank {rank}" for rank in ranks)], lines)


def calibration_table(results: Results, rank: int, arms: Sequence[str]) -> str:
    """Return the share of the gap that arms close, by the text that they are calibrated on."""
    texts = {"train": "training pairs", "wikitext2": "WikiText-2", "c4": "C4"}
    lines = [
        [ARMS[arm].title, *(percent(gap_of(results, arm, rank, calibration=text)) for text in texts)] for arm in arms
    ]
    return markdown_table(["arm", *texts.values()], lines)


def finished_table(results: Results) -> str:
    """Return the change of the losses of trained adapters when they are fitted again, over pairs."""
    lines = []
    for row in results.values():
        if "of" in row:
            before = results[row["of"]]
            parts = [bootstrapped(difference, [row["after"][part]], [before["after"][part]]) for part in _PARTS]
            title = f"{ARMS[before['arm']].title}, rank {row['rank']}, seed {row['seed']}"
            lines.append([title, f"{mean({0: before}, 'all'):.4f}", *map(signed, parts)])
    return markdown_table(["arm", "held-out loss", "its change", "of the response", "of WikiText-2"], lines)


def steps_table(results: Results, rank: int, arms: Sequence[str]) -> str:
    """Return after how many steps arms have the loss that QLoRA ends with, for each seed that both have a curve of."""
    plain = with_curve(at_best(results, "qlora", rank))
    lines = []
    for arm in arms:
        rows = with_curve(at_best(results, arm, rank))
        seeds = common(rows, plain)
        if seeds:
            found = [steps_to(rows[seed], plain[seed]["training"]["curve"][-1][1]) for seed in seeds]
            shown = ", ".join("not reached" if steps is None else f"{steps:.0f}" for steps in found)
            lines.append([ARMS[arm].title, shown, str(plain[seeds[0]]["training"]["curve"][-1][0])])
    return markdown_table(["arm", "steps, for each seed", "steps of QLoRA"], lines)


def with_curve(rows: Mapping[int, Row]) -> dict[int, Row]:
    """Return the results that have a curve."""
    return {seed: row for seed, row in rows.items() if row["training"]["curve"]}


def steps_to(row: Row, loss: float) -> float | None:
    """Return after how many steps a curve first reaches a loss, by linear interpolation; None if it never does."""
    before = row["before"]["all"]
    points = [[0, sum(before) / len(before)], *row["training"]["curve"]]
    if points[0][1] <= loss:
        return 0.0
    for (step, above), (later, below) in pairwise(points):
        if below <= loss:
            return step + (later - step) * (above - loss) / (above - below)
    return None


def mean(rows: Mapping[int, Row], part: str) -> float:
    """Return the mean loss after training over seeds and windows."""
    every = [loss for row in rows.values() for loss in row["after"][part]]
    return sum(every) / len(every)


def percent(share: Estimate | None) -> str:
    """Return a share with its interval."""
    return "" if share is None else f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def signed(change: Estimate) -> str:
    """Return a difference with half the width of its interval."""
    return f"{change.value:+.4f} ± {(change.high - change.low) / 2:.4f}"
