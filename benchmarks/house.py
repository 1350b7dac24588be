"""Figures about the files of a package: their lines, comments, docstrings and functions, as a Markdown table.

    python benchmarks/house.py                     # this package
    python benchmarks/house.py quailora ../lineax  # several folders, one row each

What is counted:

- files, lines, median, biggest file: all files `*.py` below the folder, and their lines with the blank ones. The median
  is the lower one of the two files in the middle where their number is even.
- comments: comments for each hundred lines, at the end of a line or on a line of their own. Those that a tool reads
  (`noqa`, `type:`, `fmt:`, `pragma:`) are among them, and the next column says how many they are.
- docstrings: the share of lines that belong to the docstring of a module, class or function. Strings below a constant
  do not count.
- annotated: the share of functions and methods, nested ones included, where every parameter but `self` and `cls`, and
  the result, has an annotation.
- longest def: the lines of a body from its first statement after the docstring to its last one.
- parameters: all of a function, `*args` and `**kwargs` included, but without `self` and `cls`.
- public, above 12 parameters: functions of modules and methods of classes, outside of a folder `cli`, where neither the
  name nor that of the class begins with an underscore (`__init__` and `__call__` count).
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "quailora"
LONG = 60  # lines of a body
MANY = 12  # parameters of a function

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionFigures:
    """What is counted of one function.

    Attributes:
        name: with the classes and functions around it, and without its module.
        place: file, below the package, and line.
        lines: of the body, without the docstring.
        parameters: how many, without `self` and `cls`.
        annotated: whether all of them and the result have an annotation.
        public: whether it is a public function outside of the command line.
    """

    name: str
    place: str
    lines: int
    parameters: int
    annotated: bool
    public: bool


@dataclass(frozen=True)
class House:
    """What is counted of one package.

    Attributes:
        name: of its folder.
        files: lines of each file, by its path below the package.
        comments: how many.
        directives: how many comments are for tools.
        docstrings: lines of docstrings.
        functions: all of them.
    """

    name: str
    files: dict[str, int]
    comments: int
    directives: int
    docstrings: int
    functions: list[FunctionFigures]

    @property
    def lines(self) -> int:
        """Lines of all files."""
        return sum(self.files.values())

    @property
    def longest(self) -> FunctionFigures:
        """The function with the longest body."""
        return max(self.functions, key=lambda function: function.lines)

    @property
    def long(self) -> list[FunctionFigures]:
        """Functions whose body has more than 60 lines."""
        return [function for function in self.functions if function.lines > LONG]

    @property
    def unannotated(self) -> list[FunctionFigures]:
        """Functions that lack an annotation."""
        return [function for function in self.functions if not function.annotated]

    @property
    def crowded(self) -> list[FunctionFigures]:
        """Public functions outside of the command line with more than 12 parameters."""
        return [function for function in self.functions if function.public and function.parameters > MANY]


def measure(package: Path) -> House:
    """Count what a package consists of.

    Args:
        package: its folder.

    Raises:
        ValueError: if there is no Python file in it.
    """
    files: dict[str, int] = {}
    comments: list[str] = []
    docstrings, functions = 0, []
    for path in sorted(package.rglob("*.py")):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(package)
        tree = ast.parse(text)
        files[place.as_posix()] = len(text.splitlines())
        comments += comments_of(text)
        docstrings += sum(docstring_lines(node) for node in ast.walk(tree))
        functions += functions_of(tree, place)
    if not files:
        raise ValueError(f"Expected a folder with Python files, got {package}.")
    directives = sum(comment.lstrip("# ").startswith(("noqa", "type:", "fmt:", "pragma:")) for comment in comments)
    return House(package.resolve().name, files, len(comments), directives, docstrings, functions)


def comments_of(text: str) -> list[str]:
    """Return the comments of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def docstring_lines(node: ast.AST) -> int:
    """Return how many lines the docstring of a module, class or function has; 0 where there is none."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def functions_of(
    tree: ast.AST, place: Path, around: tuple[str, ...] = (), *, public: bool = True
) -> Iterator[FunctionFigures]:
    """Yield the figures of every function in a tree.

    Args:
        tree: what to look through.
        place: the file, below the package.
        around: names of the classes and functions around it.
        public: whether what is in it can be reached from outside.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function):
            seen = public and (not node.name.startswith("_") or node.name in {"__init__", "__call__"})
            names = (*around, node.name)
            if isinstance(node, Function):
                yield figures_of(node, f"{place}:{node.lineno}", names, public=seen and "cli" not in place.parts)
                seen = False
            yield from functions_of(node, place, names, public=seen)
        else:
            yield from functions_of(node, place, around, public=public)


def figures_of(function: Function, place: str, names: tuple[str, ...], *, public: bool) -> FunctionFigures:
    """Return the figures of one function; see `FunctionFigures`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    rest = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    parameters = [argument for argument in (*named, *rest) if argument.arg not in {"self", "cls"}]
    annotated = function.returns is not None and all(argument.annotation for argument in parameters)
    statements = function.body[1:] if docstring_lines(function) else function.body
    lines = (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0
    return FunctionFigures(".".join(names), place, lines, len(parameters), annotated, public)


def row(house: House) -> dict[str, str]:
    """Return the row of a package in the table: figures by the name of their column."""
    most = max(house.functions, key=lambda function: function.parameters)
    whole, annotated = len(house.functions), len(house.functions) - len(house.unannotated)
    return {
        "": house.name,
        "files": f"{len(house.files):,}",
        "lines": f"{house.lines:,}",
        "median": str(statistics.median_low(house.files.values())),
        "biggest file": f"{max(house.files.values()):,}",
        "comments %": f"{100 * house.comments / house.lines:.1f}",
        "of these for tools %": f"{100 * house.directives / house.lines:.1f}",
        "docstrings %": f"{100 * house.docstrings / house.lines:.1f}",
        "annotated defs %": f"{100 * annotated / whole:.0f}",
        "longest def": f"{house.longest.lines} (`{house.longest.name}`)",
        "defs > 60 lines": str(len(house.long)),
        "most parameters": f"{most.parameters} (`{most.name}`)",
        "public, > 12 parameters": ", ".join(f"{each.name} {each.parameters}" for each in house.crowded) or "0",
    }


def main() -> None:
    """Print the table of the folders that the command line names."""
    parser = argparse.ArgumentParser(description="Count lines, comments, docstrings and functions of packages.")
    parser.add_argument("packages", nargs="*", type=Path, default=[PACKAGE], help="folders; quailora if there is none")
    rows = [row(measure(package)) for package in parser.parse_args().packages]
    for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(figures.values() for figures in rows)):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
