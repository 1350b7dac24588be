"""Tables, printed on the terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], justify: Literal["left", "right"] = "right"
) -> None:
    """Print a table on standard output; `justify` is for the columns after the first, which are mostly numbers."""
    # Numbers are aligned at the right, where their last digits stand below each other.
    table = Table()
    for index, column in enumerate(header):
        table.add_column(column, justify=justify if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # Off a terminal rich assumes 80 columns and would cut long names.
    Console(width=None if console.is_terminal else 140).print(Text(title), table, soft_wrap=False)


def print_note(text: str) -> None:
    """Print a remark below a table."""
    Console().print(Text(text, style="dim"), soft_wrap=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the same table in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
