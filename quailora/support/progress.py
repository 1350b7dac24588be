"""Progress bars on standard error, where a person is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

console = Console(stderr=True)


@final
@dataclass(frozen=True)
class Counter:
    """Counts steps on a progress bar.

    Attributes:
        advance: counts one more step as done.
        describe: says in a few words what is being done now.
    """

    advance: Callable[[], None]
    describe: Callable[[str], None]


@contextmanager
def counting(description: str, total: int | None, completed: int = 0) -> Iterator[Counter]:
    """Yield a counter; it is silent unless standard error is a terminal."""
    # Bars are drawn on standard error, so that standard output holds nothing but results.
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal or console.quiet) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        yield Counter(lambda: progress.advance(task), lambda text: progress.update(task, description=text))


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show how many are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counting(description, total) as counter:
        for item in items:
            yield item
            counter.advance()


@contextmanager
def shown(show: bool) -> Iterator[None]:
    """Keep progress bars away for a `with` statement, unless they are to be shown."""
    before = console.quiet
    console.quiet = before or not show
    try:
        yield
    finally:
        console.quiet = before
