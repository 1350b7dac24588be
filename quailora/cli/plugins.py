"""Modules of one's own, which the command line imports because it names them; a configuration file cannot do that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError

_RECIPES = ("recipe", "recipes", "against")
"""Options that name recipes."""


def import_module(module: str, where: str) -> None:
    """Import a module that the command line names.

    Args:
        module: its name.
        where: where it was named, for the message.

    Raises:
        ConfigurationError: if it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"Expected the name of a module that can be imported {where}, got {module!r} ({error})."
        ) from error


def import_for(name: str) -> None:
    """Import the module of a class that the command line names by its import path.

    Raises:
        ConfigurationError: if it cannot be imported.
    """
    module = name.rpartition(".")[0]
    if module and not name.startswith(("{", "quailora.")):
        import_module(module, f"in {name}")


def add_recipes(words: Sequence[str], written: Mapping[str, Any]) -> None:
    """Make the recipes known that are named as `package:NAME`, by these names.

    Args:
        words: what was typed; packages that are named there are imported.
        written: options in configuration files; packages that are named there have to be imported already.

    Raises:
        ConfigurationError: if there is no such package, or no such recipe in it.
    """
    # What is typed may import a package, because the user has named it. What a file names may not: files come from
    # others.
    for name in filter(is_foreign, typed_recipes(words)):
        import_module(name.partition(":")[0], f"in {name}")
        add_recipe(name)
    for option in _RECIPES:
        names = written.get(option, ())
        for name in [names] if isinstance(names, str) else names:
            if not (isinstance(name, str) and is_foreign(name)):
                continue
            package = name.partition(":")[0]
            if package not in sys.modules:
                raise ConfigurationError(
                    f"Expected a recipe whose package is imported, got {name!r} in the configuration file. A file "
                    f"imports nothing, because that would run code. Pass --plugin {package}, too."
                )
            add_recipe(name)


def is_foreign(name: str) -> bool:
    """Return whether a recipe is named as `package:NAME`."""
    return ":" in name


def typed_recipes(words: Sequence[str]) -> Iterable[str]:
    """Yield the names of recipes that were typed."""
    names = False
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            names = option.removeprefix("--") in _RECIPES
            if names and equals:
                yield value
        elif names:
            yield word


def add_recipe(name: str) -> None:
    """Make a recipe of an imported package known as `package:NAME`.

    Raises:
        ConfigurationError: if the package has no recipe of this name.
    """
    from ..methods.recipes import RECIPES, Recipe

    package, _, attribute = name.partition(":")
    content = vars(sys.modules[package])
    recipe = content.get(attribute)
    if not isinstance(recipe, Recipe):
        there = [key for key, value in content.items() if isinstance(value, Recipe)]
        raise ConfigurationError(
            f"Expected a Recipe named {attribute!r} in {package}, got {type(recipe).__name__}. Recipes there are "
            f"{', '.join(there) or 'none'}."
        )
    RECIPES[name] = recipe
