"""The command line: every command is a function of the package, and its options are that function's signature."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType
from typing import Any, NoReturn, final

import yaml
from jsonargparse import ArgumentParser, auto_cli, get_loader, set_loader
from rich.logging import RichHandler
from rich.text import Text

from ..adapters.convert import convert
from ..comparison.compare import compare
from ..errors import QuailoraError
from ..evaluation.check import check
from ..evaluation.evaluate import evaluate
from ..methods.recipes import RECIPES
from ..pipeline.init import init
from ..quantizers import QUANTIZERS
from ..solvers import SOLVERS
from ..support.progress import console
from ..support.tables import print_table
from .demo import demo
from .options import check_files, check_values, expand_in_file, expand_short_names, load_plugins


@final
@dataclass(frozen=True)
class Components:
    """The quantizers, solvers and recipes that have a short name."""

    def show(self) -> None:
        """Print one table for each."""
        for title, table in (("Quantizers", QUANTIZERS), ("Solvers", SOLVERS)):
            rows = [[name, f"{cls.__doc__ or ''}".partition("\n")[0]] for name, cls in table.items()]
            print_table(
                f"{title} (fields: quailora init --{title.lower()[:-1]}.help NAME)", ("name", "what"), rows, "left"
            )
        rows = [[name, row.source] for name, row in RECIPES.items()]
        print_table("Recipes (quailora init --recipe NAME)", ("name", "source"), rows, "left")


def list_components() -> Components:
    """List the quantizers, solvers and recipes."""
    return Components()


COMMANDS: dict[str, Any] = {
    "init": init,
    "evaluate": evaluate,
    "compare": compare,
    "check": check,
    "convert": convert,
    "demo": demo,
    "list": list_components,
}


class Parser(ArgumentParser):
    """Spells options as people type them: `--sequence-length 512 --targets q_proj v_proj --overwrite`."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument with these spellings."""
        if not args[0].startswith("--"):
            return super().add_argument(*args, **kwargs)
        # jsonargparse copies this method into its argument groups, where this module's names are unknown.
        from jsonargparse import ActionYesNo

        dashed = args[0].replace("_", "-")
        if kwargs.get("type") is bool:
            switch = {key: value for key, value in kwargs.items() if key != "type"}
            return super().add_argument(dashed, action=ActionYesNo, **switch)
        if args[1:] == (f"{args[0]}+",):  # a list, which jsonargparse would take as YAML or item by item
            listed: dict[str, Any] = {"help": kwargs.get("help"), "default": list(kwargs["default"])}
            item = type(next(iter(kwargs["default"]), ""))
            return super().add_argument(*dict.fromkeys((dashed, args[0])), type=item, nargs="+", **listed)
        return super().add_argument(*dict.fromkeys((dashed, *args)), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line, in place of the usage of every option, and exit with status 2."""
        del ex
        console.print(
            "[bold red]error:[/]",
            Text(f"{plain(message)} See: {self.prog.replace(' [options]', '')} --help"),
            soft_wrap=True,
        )
        raise SystemExit(2)


_REQUIRED = re.compile(r"the following arguments are required: (?:(\w+)\.)?(.+)")
_REWORDED = (
    (r'Parser key "([\w.]+)": ?', lambda found: f"--{found[1].replace('_', '-')}: "),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: ",
        r"Expected \1, got ",
    ),
    (r"\. Got value: ", ", got "),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"Expected an? (?:typing\.)?Literal\[(.*?)\]", r"Expected one of \1"),
    (r"Expected an? (?=(?:int|float|str|bool|dict)\b)", "Expected "),
    (r"argument subcommand: invalid choice: (\S+) \(choose from (.*)\)", r"There is no command \1. Expected one of \2"),
    (r'expected "subcommand" to be one of .*', f"Expected a command: {', '.join(COMMANDS)}"),
    (r"unrecognized arguments: ", "Unknown options or words: "),
)
"""What jsonargparse says, and how people say it."""


def plain(message: str) -> str:
    """Return a message of jsonargparse as one line in the words of the command line."""
    required = _REQUIRED.fullmatch(message)
    if required:
        command, missing = required[1] or "", required[2].split(", ")
        name = missing[0].removeprefix(f"{command}.")
        if name not in {"model", "adapter"}:
            return f"Expected --{name}, which is missing."
        word = name.upper()
        return f"Expected {word}, which is missing. Write it right after the command: quailora {command} {word} ..."
    text = " ".join(message.split())
    for pattern, words in _REWORDED:
        text = re.sub(pattern, words, text)
    return text if text.endswith((".", "!", "?")) else f"{text}."


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as schedulers of clusters do it."""


@contextmanager
def heeding_termination() -> Iterator[None]:
    """Raise `Terminated` when SIGTERM comes, inside a `with` statement of the main thread."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@heeding_termination()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    logging.getLogger("quailora").setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # weights on disk are what was asked for
    for package in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # missing kernels of other devices are no news
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    load_yaml = get_loader("yaml")
    set_loader("yaml", lambda text: expand_in_file(load_yaml(text)), exceptions=(yaml.YAMLError,))
    try:
        given = load_plugins(sys.argv[1:] if arguments is None else arguments)
        check_files(given)
        check_values(given)
        result = auto_cli(
            COMMANDS,
            args=expand_short_names(given),
            parser_class=Parser,
            prog="quailora",
            version=version("quailora"),
            description="Quantization-aware initialization of low-rank adapters. With --plugin MODULE, the quantizers "
            "and solvers of your own module can be named in options and configuration files, too.",
        )
        result.show()
    except QuailoraError as error:
        console.print("[bold red]error:[/]", Text(str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt as interrupt:
        ended = isinstance(interrupt, Terminated)
        console.print(
            f"{'terminated' if ended else 'interrupted'}; an unfinished init is kept, and goes on when the same "
            "command is run again"
        )
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)
    finally:
        set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    return 0
