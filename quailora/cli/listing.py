"""What `quailora list` shows: the quantizers, solvers and recipes that have a name.

Without modules of one's own the tables are read from the source text of quailora, because importing the classes takes
longer than everything else that the command does. A test compares both ways.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

from ..support.tables import print_table

_PACKAGE = __name__.partition(".")[0]

Rows = list[tuple[str, str]]
"""Names, and one line about each."""


@final
@dataclass(frozen=True)
class Components:
    """The quantizers, solvers and recipes that have a name."""

    def show(self) -> None:
        """Print one table for each."""
        for (title, what), rows in tables().items():
            print_table(title, ("name", what), rows, "left")


def tables() -> dict[tuple[str, str], Rows]:
    """Return the rows of each table by its title and the head of its second column."""
    imported = f"{_PACKAGE}.quantizers" in sys.modules  # by a module of the caller's own
    quantizers, solvers, recipes = imported_rows() if imported else source_rows()
    return {
        ("Quantizers (fields: quailora init --quantizer.help NAME)", "what"): quantizers,
        ("Solvers (fields: quailora init --solver.help NAME)", "what"): solvers,
        ("Recipes (quailora init --recipe NAME)", "source"): recipes,
    }


def imported_rows() -> tuple[Rows, Rows, Rows]:
    """Return the rows of quantizers, solvers and recipes from the imported classes, those of plugins among them."""
    from ..methods.recipes import RECIPES
    from ..quantizers import QUANTIZERS, Quantizer
    from ..solvers import SOLVERS, Solver
    from ..support.settings import is_own, subclasses, written_name

    found: list[Rows] = []
    for interface, table in ((Quantizer, QUANTIZERS), (Solver, SOLVERS)):
        classes = [*table.values(), *(cls for cls in subclasses(interface) if not is_own(cls))]
        found.append([(cls.name or written_name(cls), f"{cls.__doc__ or ''}".partition("\n")[0]) for cls in classes])
    return found[0], found[1], [(name, recipe.source) for name, recipe in RECIPES.items()]


def source_rows() -> tuple[Rows, Rows, Rows]:
    """Return the same rows of quailora's own from its source text."""
    quantizers, solvers = (list(rows_of(folder_of(name), name.upper())) for name in ("quantizers", "solvers"))
    table = assigned(parsed(folder_of("methods") / "recipes.py"), "RECIPES")
    assert isinstance(table, ast.Dict)
    recipes = [
        (str(key.value), str(value.args[0].value))
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Call) and isinstance(value.args[0], ast.Constant)
    ]
    return quantizers, solvers, recipes


def rows_of(package: Path, table: str) -> Iterator[tuple[str, str]]:
    """Yield the short name and the first line of documentation of each class that a table of a package names."""
    # Importing the classes would import PyTorch, which takes seconds. The source says the same: a table of a package
    # names classes, its imports say in which modules they are, and the classes have a name and a first line of
    # documentation.
    init = parsed(package / "__init__.py")
    homes = {alias.name: node.module for node in init.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    names = [node.id for node in ast.walk(assigned(init, table)) if isinstance(node, ast.Name) and node.id in homes]
    for name in names:
        tree = parsed(package / f"{homes[name]}.py")
        cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
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


def folder_of(room: str) -> Path:
    """Return the folder of a package inside of quailora."""
    spec = find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / room
