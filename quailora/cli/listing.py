"""What `quailora list` shows: the quantizers, solvers, metrics, families and recipes that have a name.

Without modules of one's own the tables are read from the source text of quailora, because importing the classes takes
longer than everything else that the command does. A test compares both ways.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, final

from ..support.tables import print_table
from .commands.init import init

_PACKAGE = __name__.partition(".")[0]

Rows = list[tuple[str, str]]
"""Names, and one line about each."""


@final
@dataclass(frozen=True)
class Components:
    """The quantizers, solvers, metrics, families and recipes that have a name."""

    def show(self) -> None:
        """Print one table for each."""
        for (title, what), rows in tables().items():
            print_table(title, ("name", what), rows, "left")


def tables() -> dict[tuple[str, str], Rows]:
    """Return the rows of each table by its title and the head of its second column."""
    imported = f"{_PACKAGE}.quantizers" in sys.modules  # by a module of the caller's own
    quantizers, solvers, metrics, families, recipes = imported_rows() if imported else source_rows()
    return {
        ("Quantizers (fields: quailora init --quantizer.help NAME)", "what"): with_default("quantizer", quantizers),
        ("Solvers (fields: quailora init --solver.help NAME)", "what"): with_default("solver", solvers),
        ("Metrics (fields: quailora init --metric.help NAME)", "what"): with_default("metric", metrics),
        ("Families of adapters (fields: quailora init --family.help NAME)", "what"): [
            (f"{name} (default)" if name == "lora" else name, about) for name, about in families
        ],
        # The default solver and metric together are the recipe of the same name as the solver.
        ("Recipes (quailora init --recipe NAME; * writes its own base)", "source"): with_default("solver", recipes),
    }


def with_default(option: str, rows: Rows) -> Rows:
    """Return rows in which the name that `quailora init` takes for an option by default is marked."""
    default = str(signature(init).parameters[option].default)
    return [(f"{name} (default)" if name == default else name, about) for name, about in rows]


def imported_rows() -> list[Rows]:
    """Return the rows of all tables from the imported classes, those of plugins among them."""
    from ..core.weightings import WEIGHTINGS
    from ..families import FAMILIES
    from ..methods.recipes import ALIASES, RECIPES
    from ..quantizers import QUANTIZERS
    from ..solvers import SOLVERS
    from ..support.settings import is_own, subclasses, written_name
    from .components import interfaces

    found: list[Rows] = []
    own: tuple[Mapping[str, type[Any]], ...] = (QUANTIZERS, SOLVERS, WEIGHTINGS, FAMILIES)
    shown = [interfaces()[option] for option in ("quantizer", "solver", "metric", "family")]
    for interface, table in zip(shown, own, strict=True):
        classes = [*table.values(), *(cls for cls in subclasses(interface) if not is_own(cls))]
        found.append([(cls.name or written_name(cls), f"{cls.__doc__ or ''}".partition("\n")[0]) for cls in classes])
    own_base = {name for name, recipe in RECIPES.items() if recipe.changes_base}
    return [*found, recipe_rows({name: recipe.source for name, recipe in RECIPES.items()}, ALIASES, own_base)]


def source_rows() -> list[Rows]:
    """Return the same rows of quailora's own from its source text."""
    module = parsed(file_of("methods/recipes.py"))
    table = assigned(module, "RECIPES")
    assert isinstance(table, ast.Dict)
    recipes = {
        str(key.value): value
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Call)
    }
    sources = {name: str(ast.literal_eval(recipe.args[0])) for name, recipe in recipes.items()}
    own_base = {name for name, recipe in recipes.items() if changes_base(recipe)}
    return [
        list(rows_of(file_of("quantizers/__init__.py"), "QUANTIZERS")),
        list(rows_of(file_of("solvers/__init__.py"), "SOLVERS")),
        list(rows_of(file_of("core/weightings.py"), "WEIGHTINGS")),
        list(rows_of(file_of("families/__init__.py"), "FAMILIES")),
        recipe_rows(sources, ast.literal_eval(assigned(module, "ALIASES")), own_base),
    ]


def changes_base(recipe: ast.Call) -> bool:
    """Return whether the source text of a recipe has a schedule other than `Once`, or rounds with error feedback."""
    names = {ast.unparse(each.func) for each in ast.walk(recipe) if isinstance(each, ast.Call)}
    table = assigned(parsed(file_of("schedules/__init__.py")), "SCHEDULES")
    schedules = {node.id for node in ast.walk(table) if isinstance(node, ast.Name)} - {"Once"}
    return bool(names & schedules) or any(ast.unparse(word.value) == "'feedback'" for word in recipe.keywords)


def recipe_rows(sources: Mapping[str, str], aliases: Mapping[str, str], own_base: Container[str]) -> Rows:
    """Return a row for each recipe and for each name that stands for another one; names in `own_base` are marked."""
    rows = [(name, name, source) for name, source in sources.items()]
    rows += [(alias, name, f"another name of {name}") for alias, name in aliases.items()]
    return [(f"{shown} *" if name in own_base else shown, about) for shown, name, about in rows]


def rows_of(file: Path, table: str) -> Iterator[tuple[str, str]]:
    """Yield the short name and the first line of documentation of each class that a table in a file names."""
    tree = parsed(file)
    homes = {
        alias.name: file.with_name(f"{node.module}.py")
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes |= {node.name: file for node in tree.body if isinstance(node, ast.ClassDef)}
    names = [node.id for node in ast.walk(assigned(tree, table)) if isinstance(node, ast.Name) and node.id in homes]
    for name in names:
        cls = next(node for node in parsed(homes[name]).body if isinstance(node, ast.ClassDef) and node.name == name)
        short = assigned(cls, "name")
        assert isinstance(short, ast.Constant)
        yield str(short.value), (ast.get_docstring(cls) or "").partition("\n")[0]


def assigned(body: ast.Module | ast.ClassDef, name: str) -> ast.expr:
    """Return what is assigned to an annotated name."""
    found = (node for node in body.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
    value = next(found).value
    assert value is not None
    return value


def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def file_of(path: str) -> Path:
    """Return a file inside of quailora."""
    spec = find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path
