"""The table of docs/families.md: what the starts of families of adapters other than LoRA are worth after training."""

from __future__ import annotations

from statistics import fmean

from quailora.support.tables import markdown_table

from .arms import ARMS
from .plan import Results, best_rate, by_rate
from .tables import at_best, common, less, mean

_LORA = {"qlora": "best"}
"""Plain LoRA, and the arm with the same adapter that starts fitted."""


def family_table(results: Results, rank: int) -> str:
    """Return the losses of stock starts and of fitted ones before and after training, each arm at its own best rate.

    Arms are compared run by run, on the same device with the same seed; those without both are left out.
    """
    pairs = _LORA | {name: f"{name}-best" for name, arm in ARMS.items() if arm.family is not None and not arm.recipe}
    lines = []
    for stock, fitted in pairs.items():
        rows = at_best(results, stock, rank), at_best(results, fitted, rank)
        both = common(*rows)
        if not both:
            continue
        title = "LoRA" if stock == "qlora" else ARMS[stock].title.partition(",")[0]
        cells = [title, f"{next(iter(rows[0].values()))['trained']:,}"]
        for arm, of_arm in zip((stock, fitted), rows, strict=True):
            tried = sorted(by_rate(results, arm, rank))
            rate = best_rate(results, arm, rank)
            edge = " (an edge)" if rate in (tried[0], tried[-1]) else ""
            before = [fmean(of_arm[one]["before"]["all"]) for one in both if of_arm[one]["before"]]
            cells += [f"{fmean(before):.3f}" if before else ""]
            cells += [f"{mean([of_arm[one] for one in both], 'all'):.3f} at {rate:g} of {len(tried)}{edge}"]
        cells += [less(rows[1], rows[0], both), less(rows[1], rows[0], both, "wikitext2"), str(len(both))]
        lines.append(cells)
    head = ["adapter", "numbers", "stock start", "trained", "`best` start", "trained", "less", "on WikiText-2", "runs"]
    return markdown_table(head, lines)
