"""Progress bars where a person is watching: on standard error, or in a notebook."""

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


def watched() -> bool:
    """Return whether a person sees progress bars; where not, log lines say how far a run is."""
    return (console.is_terminal or console.is_jupyter) and not console.quiet


@contextmanager
def counting(description: str, total: int | None, completed: int = 0) -> Iterator[Counter]:
    """Yield a counter; it is silent unless standard error is a terminal, or the code runs in a notebook."""
    if console.is_jupyter:
        with _counting_in_notebook(description, total, completed) as counter:
            yield counter
        return
    # Bars are drawn on standard error, so that standard output holds nothing but results.
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not watched()) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        yield Counter(lambda: progress.advance(task), lambda text: progress.update(task, description=text))


@contextmanager
def _counting_in_notebook(description: str, total: int | None, completed: int) -> Iterator[Counter]:
    """Yield a counter that is a widget where there are such, and text otherwise."""
    from tqdm.auto import tqdm

    # A bar of rich is drawn by a thread of its own in a notebook, and what is printed at the same time can get lost.
    with tqdm(total=total, initial=completed, desc=description, disable=console.quiet) as bar:
        yield Counter(bar.update, bar.set_description)


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
