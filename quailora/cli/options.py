"""What people may type and write for a quantizer or a solver, and the classes that it stands for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ..errors import ConfigurationError
from ..quantizers import QUANTIZERS, Quantizer
from ..solvers import SOLVERS, Solver

SHORT_NAMES: Mapping[str, Mapping[str, type]] = {"quantizer": QUANTIZERS, "solver": SOLVERS}
"""By option, then by name."""

_EMPTY = frozenset({"null", "Null", "NULL", "~", "None"})
"""How nothing is spelled in YAML, and in Python."""

_INTERFACES: Mapping[str, type] = {"quantizer": Quantizer, "solver": Solver}


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


def expand_in_file(content: Any) -> Any:
    """Replace the names of quantizers and solvers in a YAML file by class paths, and leave out empty options.

    A file can come from anybody, and importing a module runs its code. So a file may name only classes that are
    imported already: those of quailora, and those of a plugin that was asked for on the command line.

    Raises:
        ConfigurationError: if it names another one.
    """
    if isinstance(content, list):
        return [expand_in_file(item) for item in content]
    if not isinstance(content, dict):
        return content
    expanded: dict[Any, Any] = {}
    for key, value in content.items():
        if value is None:
            continue  # jsonargparse would pass it on for options of any type
        if key in SHORT_NAMES and isinstance(value, str):
            expanded[key] = known_path(key, value)
        elif key in SHORT_NAMES and isinstance(value, dict) and "class_path" in value:
            expanded[key] = expand_component(key, value)
        elif key == "class_path" and value not in _imported_paths():
            raise ConfigurationError(_refusal("a quantizer or a solver", value))
        else:
            expanded[key] = expand_in_file(value)
    return expanded


def check_values(arguments: Sequence[str]) -> None:
    """Raise a `ConfigurationError` for an option without a value, which jsonargparse would pass on for any type.

    A field of a component may be empty where that means something, such as `--quantizer.group_size null`.
    """
    for index, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        value = value if equals else next(iter(arguments[index + 1 :]), "-")
        interface, _, field = option.removeprefix("--").partition(".")
        if not option.startswith("--") or value not in _EMPTY or (field and _may_be_empty(interface, field)):
            continue
        raise ConfigurationError(f"Expected a value for {option}, got {value!r}. Leave it out to have the default.")


def _may_be_empty(option: str, field: str) -> bool:
    """Return whether some quantizer, or some solver, has a field of this name that may be None."""
    hints = [get_type_hints(cls).get(field) for cls in _subclasses(_INTERFACES.get(option, type))]
    return any(type(None) in get_args(hint) for hint in hints)


def expand_component(option: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a quantizer or a solver in a YAML file with its class path, for jsonargparse.

    Raises:
        ConfigurationError: if the class is not imported, or a field is empty that has to have a value.
    """
    path, fields = known_path(option, content["class_path"]), content.get("init_args") or {}
    if not isinstance(fields, dict):
        raise ConfigurationError(f"Expected the fields of {path} as a mapping under init_args, got {fields!r}.")
    hints = get_type_hints(next(cls for cls in _subclasses(_INTERFACES[option]) if class_path(cls) == path))
    for name, value in fields.items():
        if value is None and name in hints and type(None) not in get_args(hints[name]):
            raise ConfigurationError(f"Expected a value for the field {name} of {path}, got nothing.")
    return {**content, "class_path": path, "init_args": fields}


def known_path(option: str, value: Any) -> str:
    """Return the class path that a name in a file stands for: a short name, the name of a class, or its path.

    Raises:
        ConfigurationError: if it stands for no class that is imported.
    """
    for name, cls in SHORT_NAMES[option].items():
        if value in {name, cls.__name__}:
            return class_path(cls)
    for cls in _subclasses(_INTERFACES[option]):
        if value in {cls.__name__, class_path(cls), f"{cls.__module__.partition('.')[0]}.{cls.__name__}"}:
            return class_path(cls)
    raise ConfigurationError(_refusal(f"a {option}", value, SHORT_NAMES[option]))


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """Import the modules that `--plugin NAME` asks for; return the other arguments.

    Raises:
        ConfigurationError: if a module cannot be imported.
    """
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, name = word.partition("=")
        if option != "--plugin":
            rest.append(word)
            continue
        name = name if equals else next(words, "")
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"Expected the name of a module that can be imported after --plugin, got {name!r} ({error})."
            ) from error
    return rest


def check_files(arguments: Sequence[str]) -> None:
    """Raise a `ConfigurationError` that names the configuration file which is no YAML, or no text at all."""
    for index, word in enumerate(arguments):
        option, equals, name = word.partition("=")
        file = Path(name if equals else next(iter(arguments[index + 1 :]), ""))
        if option != "--config" or not file.is_file():
            continue
        try:
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            told = " ".join(str(error).split())
            raise ConfigurationError(f"Expected YAML in UTF-8 in the configuration file {file}: {told}.") from error


def class_path(cls: type) -> str:
    """Return the path that imports a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _refusal(expected: str, value: Any, names: Mapping[str, type] | None = None) -> str:
    listed = f" ({', '.join(names)})" if names else ""
    return (
        f"Expected {expected}{listed} in the configuration file, got {value!r}. A file imports nothing, because "
        "that would run code. If it is your own class, pass --plugin with the name of its module."
    )


def _imported_paths() -> set[str]:
    return {class_path(cls) for base in _INTERFACES.values() for cls in _subclasses(base)}


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
