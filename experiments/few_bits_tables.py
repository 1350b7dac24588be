"""The tables of docs/few-bits.md, from the rows that `experiments/few_bits.py` has kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quailora.support.tables import markdown_table

from .after_tables import shown
from .draw import filled
from .statistics import Estimate, bootstrapped

TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
NOTHING = "Nothing of this table has been measured yet."
STAGES = {"undistilled": "", "distilled": " + distillation"}
STEP_TOKENS = 1024
"""Tokens in a step of a distillation."""

NAMES = {
    "nearest": "rounded to nearest",
    "bare": "rounded as held-out tokens choose",
    "bare-trained": "rounded likewise, codes and scales trained by blocks",
    "auto-round": "by the package auto-round",
}
"""What is done to bases without an adapter, in words."""

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, page: Path) -> None:
    """Write the tables into a page, between their marks."""
    whole = [row for row in rows if "scores" in row]
    tables = {
        "models": models([row for row in whole if " at " not in row["key"]]),
        "rivals": rivals(whole),
        "dial": dial(whole),
        "blocks": blocks([row for row in rows if "scores" not in row]),
    }
    tables = {name: table if table.count("\n") > 1 else NOTHING for name, table in tables.items()}
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def known_mean(seconds: Iterable[float | None]) -> float | None:
    """Return the mean of the times that are known, which those of jobs that went on after a break are not."""
    known = [one for one in seconds if one is not None]
    return float(np.mean(known)) if known else None


def minutes(seconds: float) -> str:
    """Return a time in minutes."""
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "< 1 min"


def percent(share: Estimate, digits: int, sign: str = "+") -> str:
    """Return a share with its interval, in percent."""
    return shown(Estimate(*(100 * one for one in (share.value, share.low, share.high))), digits, sign) + " %"


def relative(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return how far a divergence is above another one, as a share of that."""
    return first / second - 1


def rivals(rows: Rows) -> str:
    """Return how far our bases without an adapter are from those of auto-round, paired by window and seed."""
    found = {row["key"]: row["scores"]["undistilled"] for row in rows}
    lines = []
    for base in sorted({key.split("/")[0] for key in found}):
        names = {recipe: f"{base}/{recipe}/0/" for recipe in ("bare-trained", "auto-round")}
        seeds = [key.split("/")[3] for key in found if key.startswith(names["bare-trained"])]
        seeds = [seed for seed in seeds if names["auto-round"] + seed in found]
        if not seeds:
            continue
        cells = []
        for text in TEXTS:
            ours, theirs = (
                {part: [found[name + seed][part] for seed in seeds] for part in (text, f"{text} kl")}
                for name in names.values()
            )
            cells.append(shown(bootstrapped(np.subtract, ours[text], theirs[text]), 3))
            cells.append(percent(bootstrapped(relative, ours[f"{text} kl"], theirs[f"{text} kl"]), 0))
        lines.append([base, *cells, str(len(seeds))])
    columns = (f"{title}, {what}" for title in TEXTS.values() for what in ("loss", "KL"))
    return markdown_table(("base", *columns, "seeds"), lines)


def perplexity(scores: Sequence[Sequence[float]]) -> Estimate:
    """Return the perplexity of mean losses, (seeds, windows), with its interval over windows and seeds."""
    return bootstrapped(np.exp, scores)


def perplexity_gap_closed(plain: np.ndarray, eight_bits: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """Return the share of the distance in perplexity from NF4 to int8 that an arm closes; arguments are mean losses."""
    return (np.exp(plain) - np.exp(arm)) / (np.exp(plain) - np.exp(eight_bits))


def dial(rows: Rows) -> str:
    """Return a line for each learning rate and length of a distillation, with the share of the gap to int8 it closes.

    The gap is that from NF4 to int8, both rounded to nearest and without an adapter.
    """
    ends = {row["key"]: row["scores"]["undistilled"] for row in rows if "/nearest/" in row["key"]}
    plain, eight_bits = (ends.get(f"{base}/nearest/0/0") for base in ("NF4", "int8"))
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        recipe, _, rate = row["key"].split("/")[1].partition(" at ")
        if rate:
            groups.setdefault((recipe, rate), []).append(row)
    columns = (f"{title}{what}" for title in TEXTS.values() for what in ("", ", KL", ", gap closed"))
    header = ["rate", "tokens", *columns, "seeds", "seconds"]
    lines: list[list[str]] = []
    if plain is None or eight_bits is None:
        return markdown_table(header, lines)
    for name, end in (("NF4", plain), ("int8", eight_bits)):
        numbers = [(np.exp(np.mean(end[text])), np.mean(end[f"{text} kl"])) for text in TEXTS]
        cells = [cell for mean, kl in numbers for cell in (f"{mean:.2f}", f"{kl:.4f}", "")]
        lines.append([f"{name}, no adapter", "", *cells, "", ""])
    for (_, rate), same in sorted(groups.items(), key=lambda item: float(item[0][1])):
        for stage in dict.fromkeys(stage for row in same for stage in row["scores"] if stage != "full"):
            steps = int(stage.split()[0]) if stage != "undistilled" else 0
            those = [row for row in same if stage in row["scores"]]
            cells = []
            for text in TEXTS:
                arm = [row["scores"][stage][text] for row in those]
                both = [[end[text]] * len(those) for end in (plain, eight_bits)]
                share = bootstrapped(perplexity_gap_closed, *both, arm)
                divergence = np.mean([row["scores"][stage][f"{text} kl"] for row in those])
                cells += [f"{perplexity(arm).value:.2f}", f"{divergence:.4f}", percent(share, 1, "")]
            seconds = known_mean(row["seconds"][stage] for row in those)
            spent = "-" if seconds is None else f"{seconds:.0f}"
            lines.append([rate, f"{steps * STEP_TOKENS:,}", *cells, str(len(those)), spent])
    return markdown_table(header, lines)


def blocks(rows: Rows) -> str:
    """Return a line for each setting that the first block of a model was trained with."""
    lines = []
    for row in rows:
        base, _, rank, _ = row["key"].split("/")
        for setting, (before, after) in row["blocks"].items():
            lines.append([base, rank, setting, f"{before:.5f}", f"{after:.5f}", f"{after / before - 1:+.0%}"])
    header = ("base", "rank", "trained", "error in closed form", "after training", "change")
    return markdown_table(header, lines)


def models(rows: Rows) -> str:
    """Return a line for each base, recipe, rank and stage, over all seeds that were run."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        base, recipe, rank, _ = row["key"].split("/")
        groups.setdefault((base, recipe, int(rank)), []).append(row)
    header = ["base", "recipe", "rank", "MB", *(f"{title}{what}" for title in TEXTS.values() for what in ("", ", KL"))]
    lines = []
    if rows:
        full = rows[0]["scores"]["full"]
        plain = [f"{math.exp(sum(full[text]) / len(full[text])):.2f}" for text in TEXTS]
        lines.append(["full precision", "", "", "", plain[0], "", plain[1], "", "", ""])
    for (base, recipe, rank), same in sorted(groups.items()):
        megabytes = (same[0]["bytes"] + 2 * same[0]["adapter"]) / 1e6
        before: list[str] = []
        for stage, end in STAGES.items():
            those = [row for row in same if stage in row["scores"]]
            if not those:
                continue
            numbers = []
            before.append(stage)
            for text in TEXTS:
                numbers.append(shown(perplexity([row["scores"][stage][text] for row in those]), 2, ""))
                divergences = [row["scores"][stage][f"{text} kl"] for row in those]
                numbers.append(f"{np.mean(divergences):.3f}")
            devices = ", ".join(sorted({row["device"] for row in those}))
            name = f"`{recipe}`{end}" if rank else NAMES.get(recipe, recipe)
            parts = [known_mean(row["seconds"][part] for row in those) for part in before]
            spent = None if None in parts else sum(part for part in parts if part is not None)
            time = devices if spent is None else f"{minutes(spent)}, {devices}"
            lines.append([base, name, str(rank or "-"), f"{megabytes:.1f}", *numbers, str(len(those)), time])
    return markdown_table((*header, "seeds", "time"), lines)
