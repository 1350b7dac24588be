"""The tables of docs/few-bits.md, from the rows that `experiments/few_bits.py` has kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def draw(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Write the tables into a page, between their marks."""
    whole = [row for row in rows if "scores" in row]
    tables = {"models": models(whole), "blocks": blocks([row for row in rows if "scores" not in row])}
    tables = {name: table if table.count("\n") > 1 else NOTHING for name, table in tables.items()}
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def perplexity(scores: Sequence[Sequence[float]]) -> Estimate:
    """Return the perplexity of mean losses, (seeds, windows), with its interval over windows and seeds."""
    return bootstrapped(np.exp, scores)


def blocks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each setting that the first block of a model was trained with."""
    lines = []
    for row in rows:
        base, _, rank, _ = row["key"].split("/")
        for setting, (before, after) in row["blocks"].items():
            lines.append([base, rank, setting, f"{before:.5f}", f"{after:.5f}", f"{after / before - 1:+.0%}"])
    header = ("base", "rank", "trained", "error in closed form", "after training", "change")
    return markdown_table(header, lines)


def models(rows: Sequence[Mapping[str, Any]]) -> str:
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
        for stage, end in STAGES.items():
            numbers = []
            for text in TEXTS:
                numbers.append(shown(perplexity([row["scores"][stage][text] for row in same]), 2, ""))
                divergences = [row["scores"][stage][f"{text} kl"] for row in same]
                numbers.append(f"{np.mean(divergences):.3f}")
            seconds = f"{np.mean([row['seconds'] for row in same]) / 60:.0f} min" if stage == "distilled" else ""
            name = f"`{recipe}`{end}"
            lines.append([base, name, str(rank), f"{megabytes:.1f}", *numbers, str(len(same)), seconds])
    return markdown_table((*header, "seeds", "time"), lines)
