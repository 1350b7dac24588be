"""The tables of docs/budgets.md, from the rows that `experiments/budgets.py` has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quailora.support.tables import markdown_table

from .after_tables import shown
from .draw import filled
from .few_bits_tables import NOTHING, TEXTS, percent, perplexity, relative
from .statistics import bootstrapped

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, page: Path) -> None:
    """Write the tables into a page, between their marks."""
    tables = {"models": models(rows), "differences": differences(rows)}
    tables = {name: table if table.count("\n") > 1 else NOTHING for name, table in tables.items()}
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def grouped(rows: Rows) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    """Return the rows of each budget and way to spend it, by seed."""
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        budget, what, seed = row["key"].split("/")
        groups.setdefault((budget, what), {})[int(seed)] = row
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1].startswith("plan"), item[0][1])))


def models(rows: Rows) -> str:
    """Return a line for each budget and way to spend it, over all seeds that were run."""
    header = ["budget", "model", "MB", *(f"{title}{what}" for title in TEXTS.values() for what in ("", ", KL"))]
    lines = []
    if rows:
        full = [rows[0]["scores"]["full"][text] for text in TEXTS]
        plain = [f"{np.exp(np.mean(losses)):.2f}" for losses in full]
        lines.append(["", "full precision", "", plain[0], "", plain[1], "", ""])
    for (budget, what), seeds in grouped(rows).items():
        same = list(seeds.values())
        first = same[0]
        megabytes = (first["bytes"] + 2 * first["adapter"]) / 1e6
        numbers = []
        for text in TEXTS:
            numbers.append(shown(perplexity([row["scores"]["made"][text] for row in same]), 2, ""))
            numbers.append(f"{np.mean([row['scores']['made'][f'{text} kl'] for row in same]):.3f}")
        lines.append([words(budget), title(what, first), f"{megabytes:.1f}", *numbers, str(len(same))])
    return markdown_table((*header, "seeds"), lines)


def words(budget: str) -> str:
    """Return a budget in words: a number of bits, or a model of the same bytes."""
    return f"{budget} bits" if budget.replace(".", "").isdigit() else f"as {budget}"


def title(what: str, row: Mapping[str, Any]) -> str:
    """Return the model of a row in words."""
    counted = ", ".join(f"{count} x {bits}" for bits, count in sorted(row["layers"].items(), key=lambda item: -item[1]))
    if what.startswith("plan"):
        return f"**{what}** ({counted})"
    if what == "same":
        return "this model"
    return f"16-bit skips alone ({counted})" if what == "skips" else f"{what} + rank {row['rank']}"


def differences(rows: Rows) -> str:
    """Return how far the divergence of each plan is from those of the other models of the same bytes."""
    groups = grouped(rows)
    lines = []
    pairs = [(first, second) for first in groups for second in groups
             if first[0] == second[0] and first[1].startswith("plan") and not second[1].startswith("plan")
             and ("stock" in first[1]) == ("stock" in second[1])]  # fmt: skip
    for (budget, plan), (_, what) in pairs:
        plans, seeds = groups[budget, plan], groups[budget, what]
        both = sorted(seeds.keys() & plans.keys())
        if not both:
            continue
        cells = []
        for text in TEXTS:
            parts = [[row["scores"]["made"][f"{text} kl"] for row in (some[seed] for seed in both)]
                     for some in (plans, seeds)]  # fmt: skip
            cells.append(percent(bootstrapped(relative, *parts), 0))
        lines.append([words(budget), plan, title(what, seeds[both[0]]), *cells, str(len(both))])
    return markdown_table(("budget", "", "against", *(f"{name}, KL" for name in TEXTS.values()), "seeds"), lines)
