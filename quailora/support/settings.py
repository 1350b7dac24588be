"""Components as plain data: how a quantizer, a solver or a schedule is written down, and built again.

A component is a frozen dataclass that subclasses one of the interfaces. A class of quailora is written down by its
short name, which is the class variable `name`, and any other class by its import path. Files of earlier versions have
import paths for all classes; they are read, too, even where the module has moved since.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, isabstract, signature
from operator import attrgetter
from pathlib import PurePath
from typing import Any, TypeVar, get_type_hints

from ..errors import ConfigurationError, ModelError

Component = TypeVar("Component")

_PACKAGE = __name__.partition(".")[0]

_EARLIER = {"Preserve": "SRR", "Project": "ProjQ", "ReduceMagnitude": "MagR", "Polish": "Distillation"}
"""Names that classes of quailora had in earlier versions, and what they are called now."""


def describe(value: Any) -> Any:
    """Return a value as JSON and YAML can hold it; components in the form that the command line reads.

    Args:
        value: plain data, a path, a frozen dataclass, or mappings and sequences of these.

    Raises:
        ConfigurationError: if it, or a part of it, is neither plain data nor a dataclass.
    """
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"class_path": written_name(type(value)), "init_args": arguments}
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ConfigurationError(
            f"Expected plain data or a frozen dataclass, got {value!r} of the class {type(value).__name__}. "
            "Quantizers, solvers and schedules are dataclasses, so that they can be written down and built again."
        )
    return value


def class_path(cls: type) -> str:
    """Return the path that imports a class, such as `quailora.quantizers.nf4.NF4`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def short_name(cls: type) -> str:
    """Return the short name that a class gives to itself, such as `nf4`; an empty string where it gives none."""
    name = cls.__dict__.get("name", "")  # a subclass does not inherit the name
    return name if isinstance(name, str) else ""


def written_name(cls: type) -> str:
    """Return what files have for a class.

    That is the short name of a class of quailora, or its plain name where it has no short one, and the import path of
    any other class.
    """
    return short_name(cls) or cls.__name__ if is_own(cls) else class_path(cls)


def is_own(cls: type) -> bool:
    """Return whether a class belongs to quailora."""
    return cls.__module__.partition(".")[0] == _PACKAGE


def subclasses(interface: type[Component]) -> list[type[Component]]:
    """Return all imported classes that implement an interface, those of quailora first."""
    found = [cls for child in interface.__subclasses__() for cls in (child, *subclasses(child))]
    return sorted(dict.fromkeys(found), key=lambda cls: not is_own(cls))


def find_class(interface: type[Component], name: str) -> type[Component] | None:
    """Return the imported class that a name stands for; None if there is none. Nothing is imported.

    Args:
        interface: `Quantizer`, `Solver`, `Weighting` or `Schedule`, or a class that is no interface, for itself.
        name: a short name, the name of a class, or its import path; for classes of quailora also the import path that
            an earlier version had.
    """
    known = subclasses(interface) if isabstract(interface) else [interface]
    spellings: tuple[Callable[[type], str], ...] = (class_path, short_name, attrgetter("__name__"))
    for spelled in spellings if name else ():
        for cls in known:
            if spelled(cls) == name:
                return cls
    # A path that starts with this package but is not known is that of a class which has moved, or had another name,
    # when the file was written. The last part of the path identifies it, since names are unique in the package.
    package, _, rest = name.partition(".")
    own = {cls.__name__: cls for cls in known if is_own(cls)}
    plain = rest.rpartition(".")[2]
    return own.get(_EARLIER.get(plain, plain)) if package == _PACKAGE else None


def as_command(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return the command line that calls a function of the package with these arguments; defaults are left out.

    Args:
        function: a command, such as `compare`: its positional parameters come first, its keywords are options.
        given: arguments of the call by name.
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
        words = [option, written_name(type(value))]
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
        base: `Quantizer`, `Solver`, `Weighting` or `Schedule`, or a class that is no interface, for itself.
        description: `class_path` and `init_args`.

    Raises:
        ModelError: if the class is unknown here, or its arguments do not fit.
    """
    given = description.get("init_args", {}) if isinstance(description, Mapping) else None
    if not isinstance(given, Mapping):
        raise ModelError(f"Expected class_path and init_args of a {base.__name__}, got {description!r:.80}.")
    path = str(description.get("class_path", ""))
    cls = find_class(base, path)
    if cls is None:
        raise ModelError(_unknown(base, path))
    hints = get_type_hints(cls)
    arguments = {name: _built(_interface(hints.get(name), base), value) for name, value in given.items()}
    unknown = set(arguments) - {field.name for field in fields(cls)}  # type: ignore[arg-type] # components are dataclasses
    if unknown:
        raise ModelError(f"{path} has no field {', '.join(sorted(unknown))}; it was written by another version.")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be built from {arguments}: {error}") from error


def _interface(hint: Any, base: type[Any]) -> type[Any]:
    """Return what a component in a field has to be: what the field's type says, or the interface around it."""
    return hint if isinstance(hint, type) else base


def _built(base: type[Component], value: Any) -> Any:
    """Return an argument, which may be a component itself, or a tuple that was written as a list."""
    if isinstance(value, Mapping) and "class_path" in value:
        return build(base, value)
    return tuple(value) if isinstance(value, list) else value


def _unknown(base: type[Component], path: str) -> str:
    """Return the message for a name that stands for no imported class."""
    names = ", ".join(written_name(cls) for cls in subclasses(base) if short_name(cls))
    module = path.rpartition(".")[0]
    told = f"Expected one of {names}, got {path!r}."
    if not module or module.partition(".")[0] == _PACKAGE:
        return f"{told} It was written by another version of quailora."
    return f"{told} It is defined in {module}: import that first. On the command line, pass `plugin={module}`."
