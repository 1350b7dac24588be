"""The command line: `quailora COMMAND ...`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rich.logging import RichHandler
from rich.text import Text

from ..errors import QuailoraError
from ..support.choices import did_you_mean
from ..support.progress import console
from .arguments import arguments_of, load_plugins
from .commands import COMMANDS
from .parser import as_options, command_list, refuse


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as schedulers of clusters do it."""


@contextmanager
def heeding_termination() -> Iterator[None]:
    """Raise `Terminated` when SIGTERM comes, inside a `with` statement of the main thread."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise Terminated

    # Python lets only the main thread install handlers of signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class OptionNames(logging.Filter):
    """Lets what the library logs speak of options in place of arguments; see `as_options`."""

    def __init__(self, commands: Sequence[Callable[..., Any]]) -> None:
        super().__init__()
        self.commands = commands

    def filter(self, record: logging.LogRecord) -> bool:
        """Reword a record; none is left out."""
        record.msg, record.args = as_options(record.getMessage(), self.commands), ()
        return True


@heeding_termination()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    logging.getLogger("quailora").setLevel(logging.INFO if first else logging.ERROR)
    # An argument can mean different options in different commands. Those of the command that runs come first.
    words = sys.argv[1:] if arguments is None else arguments
    called = [COMMANDS[word] for word in words if word in COMMANDS] + list(COMMANDS.values())
    reworded = OptionNames(called)
    logging.getLogger("quailora").addFilter(reworded)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # weights on disk are what was asked for
    for package in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # missing kernels of other devices are no news
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        run(words).show()
    except QuailoraError as error:
        console.print("[bold red]error:[/]", Text(as_options(str(error), called)), soft_wrap=True)
        return 1
    except KeyboardInterrupt as interrupt:
        ended = isinstance(interrupt, Terminated)
        console.print(
            f"{'terminated' if ended else 'interrupted'}; an unfinished run is kept, and goes on when the same "
            "command is run again"
        )
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)
    finally:
        logging.getLogger("quailora").removeFilter(reworded)
    return 0


def run(words: Sequence[str]) -> Any:
    """Run a command and return its result, which has a method `show`.

    Args:
        words: what was typed after `quailora`.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
        SystemExit: with status 2 and a printed message, if there is no such command or option; with status 0 after
            help.
    """
    command, *rest = load_plugins(words) or [""]
    if command in {"-h", "--help", "--version"}:
        command_list(COMMANDS).parse_args([command])
    if command not in COMMANDS:
        names = ", ".join(COMMANDS)
        if not command:
            refuse(f"Expected a command: {names}.")
        refuse(f"There is no command {command!r}. Expected one of {names}.{did_you_mean(command, COMMANDS)}")
    function = COMMANDS[command]
    return function(**arguments_of(command, function, rest))
