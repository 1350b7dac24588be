"""Progress bars on standard error, where a person is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

console = Console(stderr=True)


@contextmanager
def counting(description: str, total: int | None, completed: int = 0) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one more step as done; silent unless standard error is a terminal."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal or console.quiet) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        yield lambda: progress.advance(task)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show how many are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counting(description, total) as advance:
        for item in items:
            yield item
            advance()
