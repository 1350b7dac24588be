"""Imports point down the list of packages, and nothing below `adapters` knows PEFT."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "quailora"

FLOORS = (
    {"errors"},
    {"core", "support"},
    {"quantizers", "solvers", "models"},
    {"families"},
    {"schedules", "bases", "calibration"},
    {"layer"},
    {"adapters"},
    {"methods"},
    {"pipeline"},
    {"evaluation", "training"},
    {"budget", "comparison", "merging"},
    {"cli", "testing", "__init__"},
    {"__main__"},
)
"""Rooms of the package, from the ground up. A room imports from floors below its own only."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the room, or the outside package, that each import of a file means, with its line."""
    here = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.partition(".")[0], f"{file}:{node.lineno}") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module or "").split(".")) if node.module else base
            for name in node.names:
                yield (parts or (name.name,))[0], f"{file}:{node.lineno}"


def broken(file: Path, tree: ast.AST) -> list[str]:
    """Return the lines of a file that import what they must not."""
    room = file.relative_to(PACKAGE).with_suffix("").parts[0]
    lines = []
    for target, line in imports(file, tree):
        upward = target in FLOOR and target != room and FLOOR[target] >= FLOOR[room]
        knows_peft = target == "peft" and FLOOR[room] < FLOOR["adapters"]
        lines += [f"{line}: {room} imports {target}"] * (upward or knows_peft)
    return lines


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor():
    assert {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in FILES} == FLOOR.keys()


def test_imports_point_down():
    assert [line for file in FILES for line in broken(file, ast.parse(file.read_text(encoding="utf-8")))] == []


def test_the_guide_for_contributors_has_the_same_list():
    """And says of each room what is in it."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    printed = [set(line.strip().split(", ")) for line in text.splitlines() if line.startswith("    ")]
    rooms = [floor - {"__init__", "__main__"} for floor in FLOORS]
    assert printed == [floor for floor in rooms if floor]
    assert all(f"| `{room}` |" in text for floor in rooms[1:] for room in floor)


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("core/metrics.py", "from ..solvers import Solver"),
        ("quantizers/nf4.py", "from ..models.layers import Layer"),
        ("schedules/once.py", "def f():\n    from ..calibration import walk"),
        ("models/load.py", "from .. import pipeline"),
        ("calibration/text/files.py", "from ...adapters.hub import adapter_folder"),
        ("layer/record.py", "import peft"),
        ("errors.py", "from .core import linalg"),
    ],
)
def test_a_planted_upward_import_is_found(place, code):
    assert len(broken(PACKAGE / place, ast.parse(code))) == 1
