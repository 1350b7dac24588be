"""What is typed, and what stands in configuration files, made into the arguments of a command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from ..errors import ConfigurationError
from ..support.choices import did_you_mean
from .components import Component, class_of, is_switch, may_be_none, resolved
from .parser import command_parser, component_help
from .plugins import add_recipes, import_for, import_module

_EMPTY = frozenset({"null", "Null", "NULL", "~", "None"})
"""How nothing is spelled in YAML, and in Python."""

Typed = dict[str, tuple[str | None, tuple[str, ...]]]
"""What was typed for a component: its name, if any, and the options for its fields."""


def arguments_of(command: str, function: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that a command is to be called with.

    Args:
        command: its name.
        function: what it calls; parameters are options.
        words: what was typed after its name.

    Raises:
        ConfigurationError: if a file, a component or a module cannot be meant.
        SystemExit: with status 2 and a printed message, if an option is unknown or has a value of the wrong type; with
            status 0 after help.
    """
    parser = command_parser(command, function)
    if {"-h", "--help"} & {*words}:
        parser.parse_args(["--help"])
    # jsonargparse imports the classes of components while it parses, and with them PyTorch. So components are taken out
    # first and become objects when the command runs. What is left are plain values, of which files give the defaults.
    parameters = signature(function).parameters
    defaults = {name: each.default for name, each in parameters.items() if "Component" in str(each.annotation)}
    words = [dashed(word) for word in words]
    files, words = taken("config", words)
    typed, words = taken_components(defaults.keys(), words)
    check_values(words)
    written: dict[str, Any] = {}
    for file in files:
        written |= read_file(Path(file))
    check_written(command, written, parameters)
    chosen = {
        name: merged(name, default, component_in_file(name, written.pop(name, None)), *typed[name])
        for name, default in defaults.items()
    }
    written = {name: resolved(value) for name, value in written.items()}
    add_recipes(words, written)
    given = [f"--config={json.dumps(written)}"] if written else []
    found = parser.parse_args([*given, *words])
    return {name: found[name] for name in parameters} | chosen


def dashed(word: str) -> str:
    """Return an option as the parsers know it, with dashes between the words of its name; other words as they are."""
    name, mark, rest = re.fullmatch(r"([^.=]*)([.=]?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr] # always
    return name.replace("_", "-") + mark + rest if word.startswith("--") else word


def taken(option: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of an option that may be repeated, and the other words.

    Raises:
        ConfigurationError: if a value is missing.
    """
    values: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name != f"--{option}":
            rest.append(word)
            continue
        values.append(value if equals else next(left, ""))
        if not values[-1]:
            raise ConfigurationError(f"Expected a value for --{option}, got nothing.")
    return values, rest


def taken_components(options: Collection[str], words: Sequence[str]) -> tuple[Typed, list[str]]:
    """Return what was typed for components, such as `--quantizer gptq --quantizer.bits 3`, and the other words.

    Raises:
        ConfigurationError: if a value is missing, or the module of an import path cannot be imported.
        SystemExit: with status 0, after the help that `--quantizer.help gptq` asks for.
    """
    names: dict[str, str | None] = dict.fromkeys(options)
    fields: dict[str, list[str]] = {option: [] for option in options}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        option, _, field = flag.removeprefix("--no-").removeprefix("--").replace("-", "_").partition(".")
        if not flag.startswith("--") or option not in names:
            rest.append(word)
            continue
        if not equals and field not in {"", "help"} and is_switch(option, field):
            fields[option].append(flag.replace("_", "-"))
            continue
        value = value if equals else next(left, "")
        if not value or (value in _EMPTY and not (field and may_be_none(option, field))):
            raise ConfigurationError(f"Expected a value for {flag}, got {value!r}. Leave it out to have the default.")
        if field == "help":
            import_for(value)
            print(component_help(option, class_of(option, value)))  # noqa: T201 # what was asked for
            raise SystemExit(0)
        if field:
            fields[option] += [flag.replace("_", "-"), value]
        else:
            import_for(value)
            names[option] = value
    return {option: (names[option], tuple(fields[option])) for option in options}, rest


def merged(
    option: str, default: Component | None, written: Component | None, name: str | None, words: tuple[str, ...]
) -> Component | None:
    """Return what a component is to be: what was typed wins over what is written, and that over the default.

    Raises:
        ConfigurationError: if there are fields without a name that they could belong to.
    """
    chosen = written or default
    if name is not None:
        chosen = component_in_file(option, content_of(name, f"--{option}")) if name.startswith("{") else Component(name)
    if chosen is None and words:
        raise ConfigurationError(
            f"Expected --{option} with the name of a {option} before {words[0]}, got the field only."
        )
    return replace(chosen, words=words) if chosen is not None and words else chosen


def component_in_file(option: str, content: Any) -> Component | None:
    """Return a component as a configuration file has it: a name, or a `class_path` with `init_args`.

    Raises:
        ConfigurationError: if it is something else.
    """
    if content is None:
        return None
    if isinstance(content, str):
        return Component(content)
    name = content.get("class_path") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ConfigurationError(
            f"Expected the {option} in the configuration file as a name, or as a mapping of class_path and init_args, "
            f"got {content!r:.80}."
        )
    fields = content.get("init_args") or {}
    if not isinstance(fields, dict):
        raise ConfigurationError(f"Expected the fields of {name} as a mapping under init_args, got {fields!r:.80}.")
    return Component(name, fields)


def read_file(file: Path) -> dict[str, Any]:
    """Return the options in a configuration file. Options without a value count as left out.

    Raises:
        ConfigurationError: if there is no such file, or it is no YAML in UTF-8 with options and their values.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"Expected YAML in UTF-8 in the configuration file {file}: {error}.") from error
    content = content_of(text, f"the configuration file {file}")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"Expected options and their values in the configuration file {file}, such as rank: 16, got "
            f"{content!r:.80}."
        )
    return {str(name).replace("-", "_"): value for name, value in content.items() if value is not None}


def content_of(text: str, where: str) -> Any:
    """Return what a text in YAML holds.

    Raises:
        ConfigurationError: if it is no YAML.
    """
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"Expected YAML in UTF-8 in {where}: {' '.join(str(error).split())}.") from error


def check_written(command: str, written: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Raise a `ConfigurationError` if configuration files have what is no option, or a single value for a list."""
    for name, value in written.items():
        if name not in parameters:
            hint = did_you_mean(name, parameters)
            hint = " Pass it on the command line." if name in {"plugin", "config"} else hint
            raise ConfigurationError(f"Expected options of {command} in the configuration file, got {name!r}.{hint}")
        if "Sequence[" in str(parameters[name].annotation) and not isinstance(value, list):
            raise ConfigurationError(
                f"Expected a list for {name} in the configuration file, such as [{value}], got {value!r}."
            )


def check_values(words: Sequence[str]) -> None:
    """Raise a `ConfigurationError` for an option without a value, which jsonargparse would pass on for any type."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        value = value if equals else next(iter(words[index + 1 :]), "-")
        if option.startswith("--") and value in _EMPTY:
            raise ConfigurationError(f"Expected a value for {option}, got {value!r}. Leave it out to have the default.")


def load_plugins(words: Sequence[str]) -> list[str]:
    """Import the modules that `--plugin MODULE` asks for; return the other words.

    Raises:
        ConfigurationError: if a module cannot be imported.
    """
    modules, rest = taken("plugin", words)
    for module in modules:
        import_module(module, "after --plugin")
    return rest
