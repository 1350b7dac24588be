"""The tables of docs/after.md, from the rows that `experiments/after.py` has kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quailora.support.tables import markdown_table

from .draw import filled
from .statistics import Estimate, bootstrapped

Rows = Mapping[str, Mapping[str, Any]]
"""Rows by their keys."""

Scores = Mapping[int, Mapping[str, Any]]
"""Scores of each variant, by seeds."""

TITLES = {"qlora": "QLoRA", "quailora": "`quailora`", "best": "`best`"}
TEXTS = {"pairs": "instruction pairs", "wikitext2": "WikiText-2"}


def draw(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Write the tables into a page, between their marks."""
    by_key = {str(row["key"]): row for row in rows}
    check_adapters(by_key)
    tables = {"merges": merges(by_key), "full": full_precision(by_key), "moves": moves(by_key)}
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def check_adapters(rows: Rows) -> None:
    """Raise a `ValueError` if rows are not comparable, which no table may mix.

    Rows of one start and seed have to be about one adapter, and all pairs have to end with the same token: releases of
    transformers read different ones from the file of the demo model. Moves that have scored the full-precision merge of
    their adapter themselves need no other row, and may be of another training than the merges.
    """
    seen: dict[tuple[str, ...], str] = {}
    ends = {row["end"] for row in rows.values() if "end" in row}
    if len(ends) > 1:
        raise ValueError(f"Expected rows of pairs that end with the same token, got {sorted(ends)}.")
    for key, row in rows.items():
        if "adapter" not in row:
            continue
        kind, arm, seed, *_ = key.split("/")
        which = ("moved" if kind == "rebase" and "full" in row["scores"] else "merged", arm, seed)
        if seen.setdefault(which, row["adapter"]) != row["adapter"]:
            raise ValueError(f"{key} is about another adapter than the rows of {arm}/{seed} before it.")


def found(rows: Rows, arm: str, kind: str, end: str) -> Scores:
    """Return the scores of a job for each seed that has been run: `kind/arm/seed/end`."""
    return by_seed(rows, lambda seed: f"{kind}/{arm}/{seed}{end}")


def by_seed(rows: Rows, key_of: Callable[[int], str]) -> Scores:
    """Return the scores of a job for each seed that has been run."""
    keys = {seed: key_of(seed) for seed in range(10)}
    return {seed: rows[key]["scores"] for seed, key in keys.items() if key in rows}


def numbers(
    scores: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], variant: str, what: str
) -> list[list[float]]:
    """Return the numbers of a variant, (seeds, pairs or windows)."""
    return [scores[seed][variant][what] for seed in seeds]


def shown(estimate: Estimate, digits: int = 3, sign: str = "+") -> str:
    """Return a number with its interval."""
    form = f"{{:{sign}.{digits}f}}"
    return f"{form.format(estimate.value)} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def merges(rows: Rows) -> str:
    """Return the divergences of merged models from the unmerged ones, and their losses."""
    lines = []
    for arm, title in TITLES.items():
        reference = found(rows, arm, "reference", "")
        for name, into in (("nf4", "NF4"), ("gptq", "GPTQ, 4 bits")):
            ways = [
                ("`merge`", found(rows, arm, "merge", f"/{name}/trained"), "merged"),
                ("`merge --scale-steps 0`", found(rows, arm, "part", f"/{name}/blocks"), "merged"),
                ("`merge --block-steps 0`", found(rows, arm, "part", f"/{name}/scales"), "merged"),
                ("`merge` without training", found(rows, arm, "part", f"/{name}/none"), "merged"),
                ("`merge`, blocks trained twice as long", found(rows, arm, "part", f"/{name}/longer"), "merged"),
                ("`merge`, other text, too", found(rows, arm, "mixed", f"/{name}"), "merged"),
                ("`merge --target full`", found(rows, arm, "merge", f"/{name}/full"), "merged"),
                ("the trained weights rounded", reference, f"rounded {name}"),
                ("merged in full precision, rounded", reference, f"full, rounded {name}"),
            ]
            if name == "gptq":
                ways.append(("merged in full precision, GPTQ", reference, "full, GPTQ"))
                ways.append(("merged in full precision, gptqmodel", found(rows, arm, "gptqmodel", ""), "gptqmodel"))
            for way, scores, variant in ways:
                both = {seed: one for seed, one in scores.items() if seed in reference and variant in one}
                if both:
                    lines.append([title, into, way, *cells(both, reference, variant, f"rounded {name}")])
        if reference:
            lines.append([title, "16 bits", "`convert --merge`", *cells(reference, reference, "full", "rounded nf4")])
    head = ["start", "into", "way"]
    for text in TEXTS.values():
        head += [f"KL, {text}", "of rounding", "loss less that of the unmerged model"]
    return markdown_table([*head, "seeds"], lines)


def cells(scores: Scores, reference: Scores, variant: str, rounded: str) -> list[str]:
    """Return the cells of a way to merge: divergence, its share, and the loss, for each text; and the seeds.

    Shares are those of the divergence of the trained weights rounded to nearest in the same format.
    """
    seeds = sorted(scores.keys() & reference.keys())
    line = []
    for text in TEXTS:
        divergence = numbers(scores, seeds, variant, f"{text} kl")
        nearest = numbers(reference, seeds, rounded, f"{text} kl")
        share = bootstrapped(lambda one, other: one / other, divergence, nearest)
        losses = numbers(scores, seeds, variant, text), numbers(reference, seeds, "unmerged", text)
        line += [
            f"{np.mean(divergence):.4f}",
            shown(share, 2, ""),
            shown(bootstrapped(lambda one, other: one - other, *losses)),
        ]
    return [*line, str(len(seeds))]


def full_precision(rows: Rows) -> str:
    """Return the losses of the unmerged models and of the full-precision ones with what was trained."""
    lines = []
    for arm, title in TITLES.items():
        reference = found(rows, arm, "reference", "")
        if not reference:
            continue
        seeds, line = sorted(reference), [title]
        for text in TEXTS:
            unmerged, full = (numbers(reference, seeds, variant, text) for variant in ("unmerged", "full"))
            apart = bootstrapped(lambda one, other: one - other, full, unmerged)
            line += [f"{np.mean(unmerged):.3f}", f"{np.mean(full):.3f}", shown(apart)]
        lines.append([*line, str(len(seeds))])
    head = ["start"]
    for text in TEXTS.values():
        head += [f"unmerged, {text}", "in full precision", "less"]
    return markdown_table([*head, "seeds"], lines)


def moves(rows: Rows) -> str:
    """Return how much of the gain of fine-tuning is left on other bases, without training and after training again."""
    lines = []
    for name in ("int8", "gptq4", "hqq4", "gptq3"):
        starts = {16: rows.get(f"start/{name}"), 32: rows.get(f"start/{name}/32")}
        ways: list[tuple[str, str, Callable[[int], str], str, int]] = [
            ("trained again", "best", lambda seed: f"again/{name}/{seed}", "trained again", 16)  # noqa: B023
        ]
        for arm, rank in (("best", 16), ("best", 32), ("quailora", 32), ("qlora", 32)):
            key = f"rebase/{arm}/{{}}/{name}/{rank}"
            ways.append((f"{TITLES[arm]} moved, rank {rank}", arm, key.format, "rebased", rank))
        for way, arm, key_of, variant, rank in ways:
            start = starts[rank]
            if start is not None:
                lines += line_of(rows, start["scores"], name, (way, arm, key_of, variant))
    head = ["base", "way", "loss before", "loss after", "share of the gain, pairs", "loss on WikiText-2", "seeds"]
    return markdown_table(head, lines)


def line_of(
    rows: Rows, start: Mapping[str, Any], name: str, way: tuple[str, str, Callable[[int], str], str]
) -> list[list[str]]:
    """Return the line of one way to come to a base; none if it was not run.

    The gain in full precision is the loss of the model before training less that of the full-precision merge.
    """
    title, arm, key_of, variant = way
    ends = by_seed(rows, key_of)
    reference = {**found(rows, arm, "reference", ""), **{seed: end for seed, end in ends.items() if "full" in end}}
    seeds = sorted(ends.keys() & reference)
    if not seeds:
        return []
    after = [ends[seed][variant] for seed in seeds]
    losses = [one["pairs"] for one in after]
    before, own = [start["start"]["pairs"]] * len(seeds), [start["full"]["pairs"]] * len(seeds)
    full = numbers(reference, seeds, "full", "pairs")
    share = bootstrapped(lambda b, a, w, f: (b - a) / (w - f), before, losses, own, full)
    wikitext = float(np.mean([one["wikitext2"] for one in after]))
    return [
        [
            name,
            title,
            f"{np.mean(before):.3f}",
            f"{np.mean(losses):.3f}",
            shown(share, 2, ""),
            f"{wikitext:.3f}",
            str(len(seeds)),
        ]
    ]
