"""The command line: every command is a function of the package, and its options are that function's signature."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

import yaml
from jsonargparse import ArgumentParser, auto_cli, get_loader, set_loader
from rich.logging import RichHandler
from rich.text import Text

from .adapters.convert import convert
from .check import check
from .comparison import compare
from .demo import demo
from .errors import ConfigurationError, QuailoraError
from .evaluate import evaluate
from .pipeline import init
from .progress import console
from .quantizers import QUANTIZERS
from .recipes import RECIPES
from .report.tables import print_table
from .solvers import SOLVERS


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

SHORT_NAMES: dict[str, dict[str, type]] = {"quantizer": dict(QUANTIZERS), "solver": dict(SOLVERS)}


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


def expand_short_names(arguments: Sequence[str]) -> list[str]:
    """Replace `--quantizer nf4` by the full class path that jsonargparse resolves, and `--solver quailora` likewise."""
    expanded = list(arguments)
    for index, argument in enumerate(expanded):
        option, equals, value = argument.removeprefix("--").partition("=")
        if option.removesuffix(".help") not in SHORT_NAMES or not argument.startswith("--"):
            continue
        if equals:
            expanded[index] = f"--{option}={full_name(option, value)}"
        elif index + 1 < len(expanded):
            expanded[index + 1] = full_name(option, expanded[index + 1])
    return expanded


def expand_in_yaml(content: Any) -> Any:
    """Do the same inside YAML: `quantizer: nf4`, and `quantizer: {class_path: nf4, init_args: {...}}`."""
    if not isinstance(content, dict):
        return content
    expanded: dict[Any, Any] = {}
    for key, value in content.items():
        if key in SHORT_NAMES and isinstance(value, str):
            expanded[key] = full_name(key, value)
        elif key in SHORT_NAMES and isinstance(value, dict) and isinstance(value.get("class_path"), str):
            expanded[key] = value | {"class_path": full_name(key, value["class_path"])}
        else:
            expanded[key] = expand_in_yaml(value)
    return expanded


def full_name(option: str, value: str) -> str:
    """Return the class path of a short name; class names, paths and YAML are left for jsonargparse.

    Raises:
        ConfigurationError: if the value can be none of these.
    """
    names = SHORT_NAMES[option.removesuffix(".help")]
    if value in names:
        return class_path(names[value])
    if value.islower() and value.isidentifier():
        raise ConfigurationError(
            f"Unknown {option} {value!r}. Expected one of {', '.join(names)}, or the import path of your own class."
        )
    return value


def class_path(cls: type) -> str:
    """Return the path that imports a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


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
    set_loader("yaml", lambda text: expand_in_yaml(load_yaml(text)), exceptions=(yaml.YAMLError,))
    try:
        result = auto_cli(
            COMMANDS,
            args=expand_short_names(sys.argv[1:] if arguments is None else arguments),
            parser_class=Parser,
            prog="quailora",
            version=version("quailora"),
            description="Quantization-aware initialization of low-rank adapters.",
        )
        result.show()
    except QuailoraError as error:
        console.print("[bold red]error:[/]", Text(str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; an unfinished init is kept, and goes on when the same command is run again")
        return 130
    finally:
        set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    return 0
