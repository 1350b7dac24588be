"""Messages of the library speak of arguments; only the command line has options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "quailora"

OTHERS = {"--no-deps", "--nproc-per-node"}
"""Options of pip and torchrun, which messages may name."""


def options_in(tree: ast.AST) -> Iterator[str]:
    """Yield the options that strings of a file name, docstrings left out."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from (found for found in re.findall(r"--[a-z][a-z-]*", node.value) if found not in OTHERS)


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0] != "cli"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_message_below_the_command_line_names_an_option(file):
    assert list(options_in(ast.parse(file.read_text(encoding="utf-8")))) == []


def test_a_planted_option_is_found():
    assert list(options_in(ast.parse('def f():\n    """--no."""\n    raise ValueError(f"Pass --base, {1}.")'))) == [
        "--base"
    ]
