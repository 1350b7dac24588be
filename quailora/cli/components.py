"""Quantizers and solvers as people ask for them: a name with fields, which becomes an object when the command runs.

The classes are imported only when they are needed, because they need PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, final, get_args, get_type_hints

from ..errors import ConfigurationError
from ..support.choices import did_you_mean
from ..support.settings import class_path, find_class, short_name, subclasses


@final
@dataclass(frozen=True)
class Component:
    """A quantizer or a solver as it was asked for.

    Attributes:
        name: short name, name of the class, or import path.
        fields: fields of the class, as a configuration file gives them.
        words: fields of the class as typed, such as `--quantizer.bits 3`; they win over `fields`.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the name, which the help shows."""
        return self.name

    def made(self, option: str) -> Any:
        """Return the object that is asked for.

        Args:
            option: what asks for it, "quantizer" or "solver".

        Raises:
            ConfigurationError: if there is no such class, or a file gives fields that do not fit it.
            SystemExit: with status 2 and a printed message, if an option has a value of the wrong type.
        """
        # Fields from a file and those that were typed go through one parser, which converts both to the types of the
        # class.
        from .parser import component_parser

        cls = class_of(option, self.name)
        parser = component_parser(option, cls)
        from_file = resolved_fields(option, cls, self.fields)
        given = [f"--config={json.dumps({option: from_file})}"] if from_file else []
        return parser.instantiate(parser.parse_args([*given, *self.words]))[option]


def interfaces() -> dict[str, type[Any]]:
    """Return the interface of the objects that each option asks for."""
    from ..core.weightings import Weighting
    from ..families import Family
    from ..quantizers import Quantizer
    from ..solvers import Solver

    return {"quantizer": Quantizer, "into": Quantizer, "solver": Solver, "metric": Weighting, "family": Family}


def class_of(option: str, name: str) -> type[Any]:
    """Return the class that a name stands for.

    Raises:
        ConfigurationError: if it stands for none that is imported.
    """
    interface = interfaces()[option]
    found = find_class(interface, name)
    if found is None:
        refuse_family(option, name)
        names = [short_name(cls) for cls in subclasses(interface) if short_name(cls)]
        raise ConfigurationError(
            f"Unknown {option} {name!r}. Expected one of {', '.join(names)}, or the name of a class in your own "
            f"module, which has to be imported: pass --plugin {name.rpartition('.')[0] or 'MODULE'}."
            f"{did_you_mean(name, names)}"
        )
    return found


def refuse_family(option: str, name: str) -> None:
    """Raise a `ConfigurationError` with the reason if PEFT knows a family by this name that has no start here."""
    from ..families import REFUSED, find_family

    if option == "family" and name.lower().replace("-", "_") in REFUSED:
        find_family(name)


def resolved_fields(option: str, cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a file gives, with import paths in place of names of components.

    A file can come from anybody, and importing a module runs its code, so only classes that are imported may be named.

    Raises:
        ConfigurationError: if the class does not have a field, a field has no value that has to have one, or a class is
            named that is not imported.
    """
    known = [each.name for each in fields(cls)]
    hints = get_type_hints(cls)
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(
                f"Expected fields of {cls.__name__} in the configuration file ({', '.join(known) or 'it has none'}), "
                f"got {name!r}."
            )
        if value is None and type(None) not in get_args(hints[name]):
            raise ConfigurationError(f"Expected a value for the field {name} of the {option}, got nothing.")
    return {name: resolved(value, isinstance(hints[name], type)) for name, value in given.items()}


def resolved(value: Any, by_name: bool = False) -> Any:
    """Return a value of a file in which every class is named by its import path.

    Args:
        value: value of a field or of an option.
        by_name: whether text can be the name of a class.

    Raises:
        ConfigurationError: if a class is named that is not imported.
    """
    if isinstance(value, list):
        return [resolved(item, by_name) for item in value]
    if isinstance(value, str) and by_name and "." in value:
        return resolved({"class_path": value})["class_path"]
    if not isinstance(value, dict):
        return value
    rest = {key: resolved(item) for key, item in value.items() if key != "class_path"}
    if "class_path" not in value:
        return rest
    found = [find_class(interface, str(value["class_path"])) for interface in interfaces().values()]
    if not any(found):
        raise ConfigurationError(
            f"Expected the name of a class that is imported, got {value['class_path']!r} in the configuration file. A "
            "file imports nothing, because that would run code. If the class is your own, pass --plugin with the name "
            "of its module."
        )
    return {"class_path": next(class_path(cls) for cls in found if cls is not None), **rest}


def hints_of(option: str, name: str) -> list[Any]:
    """Return the types of a field of this name in the classes that have one."""
    hints = [get_type_hints(cls).get(name) for cls in subclasses(interfaces()[option])]
    return [hint for hint in hints if hint is not None]


def is_switch(option: str, name: str) -> bool:
    """Return whether a field is yes or no in every class that has it, so that no value follows it when it is typed."""
    hints = hints_of(option, name)
    return bool(hints) and all(hint is bool for hint in hints)


def may_be_none(option: str, name: str) -> bool:
    """Return whether a field of this name may be None in some class."""
    return any(type(None) in get_args(hint) for hint in hints_of(option, name))
