"""Components as plain data: how a quantizer or a solver is written down, and built again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from pathlib import PurePath
from typing import Any, TypeVar

from ..errors import ConfigurationError, ModelError

Component = TypeVar("Component")


def describe(value: Any) -> Any:
    """Return a value as JSON and YAML can hold it; components in the form that the command line reads.

    Raises:
        ConfigurationError: if it, or a part of it, is neither plain data nor a dataclass.
    """
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        arguments = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ConfigurationError(
            f"Expected plain data or a frozen dataclass, got {value!r} of the class {type(value).__name__}. "
            "Quantizers, solvers and schedules are dataclasses, so that they can be written down and built again."
        )
    return value


def as_command(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return the command line that calls a function of the package with these arguments; defaults are left out.

    Args:
        function: a command, such as `compare`: its positional parameters come first, its keywords are options.
        given: its arguments by name.
    """
    words = ["quailora", function.__name__]
    for name, parameter in signature(function).parameters.items():
        value = given[name]
        if parameter.kind is not Parameter.KEYWORD_ONLY:
            words.append(str(value))
        elif value != parameter.default:
            words += _as_option(f"--{name.replace('_', '-')}", value)
    return shlex.join(words)


def _as_option(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option]
    if is_dataclass(value):
        words = [option, type(value).__name__]
        for field in fields(value):
            own = getattr(value, field.name)
            if own != field.default:
                words += [f"{option}.{field.name}", str(own)]
        return words
    if isinstance(value, (list, tuple)):
        return [option, *map(str, value)]
    return [option, str(value)]


def build(base: type[Component], description: Mapping[str, Any]) -> Component:
    """Build what `describe` wrote down.

    Only subclasses of `base` that are already imported are considered, so that reading a file imports nothing.

    Args:
        base: `Quantizer`, `Solver` or `Schedule`.
        description: `class_path` and `init_args`.

    Raises:
        ModelError: if the class is unknown here, or its arguments do not fit.
    """
    given = description.get("init_args", {}) if isinstance(description, Mapping) else None
    if not isinstance(given, Mapping):
        raise ModelError(f"Expected class_path and init_args of a {base.__name__}, got {description!r:.80}.")
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(base)}
    path = str(description.get("class_path", ""))
    if path not in known:
        raise ModelError(
            f"Expected one of {', '.join(sorted(known))}, got {path!r}. "
            f"If it is your own {base.__name__}, import its module first."
        )
    cls = known[path]
    arguments = {name: _built(base, value) for name, value in given.items()}
    unknown = set(arguments) - {field.name for field in fields(cls)}  # type: ignore[arg-type] # components are dataclasses
    if unknown:
        raise ModelError(f"{path} has no field {', '.join(sorted(unknown))}; it was written by another version.")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be built from {arguments}: {error}") from error


def _built(base: type[Component], value: Any) -> Any:
    """Return an argument, which may be a component itself, or a tuple that was written as a list."""
    if isinstance(value, Mapping) and "class_path" in value:
        return build(base, value)
    return tuple(value) if isinstance(value, list) else value


def _subclasses(base: type[Component]) -> Iterator[type[Component]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)
