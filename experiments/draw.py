"""Write the tables and plots of docs/worth.md, and a table of the README, from the results beside this file."""

from __future__ import annotations

import re
from pathlib import Path

from .families import family_table
from .plan import reference_rank
from .plots import draw_curves, draw_ranks, draw_rates
from .protocol import Protocol
from .runs import Store
from .tables import (
    calibration_table,
    cost_table,
    curvature_table,
    finished_table,
    main_table,
    rank_table,
    rate_table,
    short_table,
    steps_table,
    tasks_table,
    tokens_table,
)

SHOWN = ("int8", "qlora", "best", "best-frozen", "best-twice", "best-joint-frozen", "best-joint-twice")
"""Arms of the plots against rate and step."""

BY_RANK = ("best-frozen", "best-twice")
"""Arms that were run at several ranks."""

BY_TEXT = ("best-frozen",)
"""Arms that were run with several calibration texts."""

IN_SHORT = (
    "loftq",
    "best",
    "best-frozen",
    "best-twice",
    "best-joint",
    "best-joint-frozen",
    "best-joint-twice",
    "best-joint-four",
)
"""Arms in the README."""


def in_short(protocol: Protocol) -> dict[str, str]:
    """Return the table of the README by the name that its place has there."""
    return {"worth": short_table(Store(protocol).rows(), reference_rank(protocol), IN_SHORT)}


def parts(protocol: Protocol) -> dict[str, str]:
    """Return every table of the page by the name that its place in the page has."""
    rank, results = reference_rank(protocol), Store(protocol).rows()
    return {
        "main": main_table(results, rank),
        "rates": rate_table(results, rank),
        "ranks": rank_table(results, protocol.ranks, BY_RANK),
        "curvature": curvature_table(results, Store(protocol, kind="curvature").rows(), rank),
        "tokens": tokens_table(results, Store(protocol, kind="tokens").rows(), rank),
        "cost": cost_table(Store(protocol, kind="cost").rows()),
        "tasks": tasks_table(Store(protocol, kind="tasks").rows(), rank),
        "finished": finished_table(results),
        "steps": steps_table(results, rank, SHOWN),
        "calibration": calibration_table(results, rank, BY_TEXT),
    }


def of_families(protocol: Protocol) -> dict[str, str]:
    """Return the table of docs/families.md by the name that its place has there."""
    return {"trained": family_table(Store(protocol, kind="families").rows(), reference_rank(protocol))}


def filled(page: str, tables: dict[str, str]) -> str:
    """Return a page with each table between its `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: if the page has no place for a table.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        page, count = re.subn(
            pattern, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"Expected one place for the table {name!r} in the page, found {count}.")
    return page


def draw_all(protocol: Protocol, page: Path, readme: Path) -> None:
    """Write the tables into the page and the README, and the plots beside the page."""
    others = page.with_name("families.md"), of_families(protocol)
    for file, tables in ((page, parts(protocol)), (readme, in_short(protocol)), others):
        file.write_text(filled(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
    rank, results = reference_rank(protocol), Store(protocol).rows()
    draw_rates(results, rank, SHOWN, page.with_name("worth-rates.svg"))
    draw_curves(results, rank, SHOWN, page.with_name("worth-curves.svg"))
    draw_ranks(results, protocol.ranks, BY_RANK, page.with_name("worth-ranks.svg"))
