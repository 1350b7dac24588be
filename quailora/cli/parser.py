"""Parsers of the commands, made from the signatures of their functions, and messages as people say them."""

from __future__ import annotations

import json
import re
import shlex
from argparse import SUPPRESS
from argparse import ArgumentParser as PlainParser
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from inspect import Parameter, getdoc, signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.text import Text

from ..support.choices import did_you_mean
from ..support.progress import console
from ..support.settings import class_path, short_name

_PLUGIN = "a module of your own to import first; the quantizers, solvers and recipes in it can then be named"
_CONFIG = "a YAML file with any of these options; what the command line says wins over it"


class Parser(ArgumentParser):
    """Spells options as people type them: `--sequence-length 512 --targets q_proj v_proj --overwrite`."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument with these spellings."""
        if not args[0].startswith("--"):
            return super().add_argument(*args, **kwargs)
        # jsonargparse copies this method into its argument groups, where this module's names are unknown.
        from argparse import SUPPRESS

        from jsonargparse import ActionYesNo

        dashed = args[0].replace("_", "-")
        if kwargs.get("type") is bool:
            switch = {key: value for key, value in kwargs.items() if key != "type"}
            return super().add_argument(dashed, action=ActionYesNo(no_prefix="no-"), **switch)
        if "Component" in f"{kwargs.get('type')} {getattr(kwargs.get('action'), '_typehint', '')}":
            if dashed.endswith(".help"):  # jsonargparse adds it for some types only
                return super().add_argument(dashed, type=str, help=SUPPRESS)
            name = dashed.removeprefix("--")
            told = (
                f"{kwargs['help']} Its fields are typed as {dashed}.FIELD; {dashed}.help {name.upper()} explains them."
            )
            default = kwargs["default"] and str(kwargs["default"])
            return super().add_argument(dashed, type=str, metavar=name.upper(), default=default, help=told)
        if args[1:] == (f"{args[0]}+",):  # a list, which jsonargparse would take as YAML or item by item
            listed: dict[str, Any] = {"help": kwargs.get("help"), "default": list(kwargs["default"])}
            item = type(next(iter(kwargs["default"]), ""))
            return super().add_argument(dashed, type=item, nargs="+", **listed)
        return super().add_argument(dashed, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line, in place of the usage of every option, and exit with status 2."""
        del ex
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        hint = did_you_mean(unknown, self._option_string_actions) if unknown.startswith("--") else ""
        refuse(plain(message, self.prog) + hint, self.prog if " --" in self.prog else f"{self.prog} --help")


def command_parser(name: str, function: Callable[..., Any]) -> Parser:
    """Return the parser of a command: positional parameters are words, keywords are options."""
    summary = (getdoc(function) or "").partition("\n\nArgs:")[0]
    # `--plugin` is taken out before anything is parsed, because what it imports decides which names are valid. It is
    # added for the help alone.
    parser = Parser(prog=f"quailora {name}", description=summary, print_config=None)
    parser.add_argument("--config", action="config", help=_CONFIG)
    parser.add_argument("--plugin", type=str, metavar="MODULE", help=_PLUGIN)  # for the help: taken out before
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def component_parser(option: str, cls: type[Any]) -> Parser:
    """Return the parser of the fields of a class, such as `--quantizer.bits 3`, and of `--config` for all of them."""
    see = f"quailora init --{option}.help {short_name(cls) or class_path(cls)}"
    parser = Parser(prog=see, print_config=None)
    parser.add_class_arguments(cls, option)
    # An object that is the default of a field is named by its class, since its interface cannot be made.
    objects = {each.name: each.default for each in fields(cls) if is_dataclass(each.default)}
    parser.set_defaults({f"{option}.{name}": described(one) for name, one in objects.items()})
    parser.add_argument("--config", action="config", help=SUPPRESS)
    return parser


def described(component: Any) -> dict[str, Any]:
    """Return the class of an object and the values of its fields, as a configuration file has them."""
    return {"class_path": class_path(type(component)), "init_args": vars(component)}


def component_help(option: str, cls: type[Any]) -> str:
    """Return the description of a class and of its fields, as options of the command line."""
    parser = Parser(prog="quailora COMMAND", usage=SUPPRESS, add_help=False)
    parser.add_class_arguments(cls, option)
    return str(parser.format_help()).strip()


def command_list(commands: Mapping[str, Callable[..., Any]]) -> PlainParser:
    """Return the parser that prints what `quailora --help` says."""
    parser = PlainParser(
        prog="quailora",
        description="Quantization-aware initialization of low-rank adapters.",
        epilog="quailora COMMAND --help explains the options of a command, and quailora list names its components. "
        "With --plugin MODULE, the quantizers, solvers and recipes of your own module can be named, too.",
    )
    parser.add_argument("--version", action="version", version=f"quailora {version('quailora')}")
    chosen = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, function in commands.items():
        chosen.add_parser(name, help=(getdoc(function) or "").partition("\n")[0], add_help=False)
    return parser


def refuse(message: str, see: str = "quailora --help") -> NoReturn:
    """Print in one line what is wrong with the arguments and where to look, and exit with status 2."""
    console.print("[bold red]error:[/]", Text(f"{message} See: {see}"), soft_wrap=True)
    raise SystemExit(2)


_REQUIRED = re.compile(r"the following arguments are required: (.+)")
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
    (r"unrecognized arguments: ", "Unknown options or words: "),
    (r"Expected (\w+), NoneType, got", r"Expected \1, got"),
)
"""What jsonargparse says, and how people say it."""


def plain(message: str, prog: str) -> str:
    """Return a message of jsonargparse as one line in the words of the command line."""
    required = _REQUIRED.fullmatch(message)
    if required:
        name = required[1].split(", ")[0]
        if name not in {"model", "adapter"}:
            return f"Expected --{name}, which is missing."
        return f"Expected {name.upper()}, which is missing. Write it right after the command: {prog} {name.upper()} ..."
    text = " ".join(message.split())
    for pattern, words in _REWORDED:
        text = re.sub(pattern, words, text)
    return text if text.endswith((".", "!", "?")) else f"{text}."


_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")


def as_options(message: str, commands: Sequence[Callable[..., Any]]) -> str:
    """Return a message of the library, which speaks of arguments, in the words of the command line.

    An argument in backquotes, such as `base` or `save_base=True`, becomes the option `--base` or `--save-base`, and a
    positional one the word that the help has for it, such as MODEL. Values become words as a shell takes them:
    `device='cpu'` becomes `--device cpu`, and a list several words. Other words in backquotes stay as they are.

    Args:
        message: what the library says.
        commands: what commands call, whose parameters are the arguments; those of the first count most.
    """
    # Later entries win, so the functions are gone through backwards: the command that runs is the first of them.
    known = {name: one for function in commands[::-1] for name, one in signature(function).parameters.items()}

    def spelled(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in {*known, "plugin"}:
            return found[0]
        if (
            name in known
            and known[name].kind is Parameter.POSITIONAL_OR_KEYWORD
            and known[name].default is Parameter.empty
        ):
            return name.upper()
        return f"--{name.replace('_', '-')}" + (f" {as_words(value)}" if value not in {None, "True"} else "")

    return _ARGUMENT.sub(spelled, message)


def as_words(value: str) -> str:
    """Return a value as Python writes it in the words that a shell takes for it; what is no Python stays as it is."""
    try:
        content = literal_eval(value)
    except (SyntaxError, ValueError):
        return value
    if isinstance(content, list):
        return shlex.join(map(str, content))
    return shlex.quote(json.dumps(content) if isinstance(content, dict) else str(content))
