"""The pages name what exists, and the page of the API has every public name once."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter

import pytest

import quailora
from examples import ROOT

DIRECTIVE = re.compile(
    r"^\.\. (?:auto|py:)(class|function|module|data|exception)::[ ]+(\S+)\n((?:[ ]+:.*\n)*)", re.MULTILINE
)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
NAME = re.compile(r"\bquailora(?:\.\w+)+")
NO_NAMES = {"quailora.json", "quailora.toml"}  # files


def resolve(name):
    """Return what a dotted name means; raise an AttributeError or ImportError where it means nothing."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: number + 1]))
        found = getattr(found, part)
    return found


def directives():
    """Yield kind, name and listed members of every directive of the page."""
    for kind, name, options in DIRECTIVE.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        members = re.search(r":members:(.*)", options)
        yield kind, name, [part.strip() for part in members[1].split(",") if part.strip()] if members else []


def documented():
    """Return the names that the page documents, with the members that it lists by name and those of whole modules."""
    names = []
    for kind, name, members in directives():
        if kind != "module":
            names.append(name)
        else:
            names += [f"{name}.{member}" for member in members or public_names(resolve(name))]
    return names


def public_names(module):
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")]


def test_every_documented_name_exists_and_is_what_the_page_takes_it_for():
    kinds = {"class": type, "exception": type}
    assert len(list(directives())) > 50
    for kind, name, members in directives():
        value = resolve(name)
        assert isinstance(value, kinds.get(kind, object)), f"{name} is no {kind}"
        assert kind != "function" or (callable(value) and not isinstance(value, type)), f"{name} is no function"
        for member in members:
            assert hasattr(value, member), f"{name} has no {member}"


def test_every_public_name_is_documented():
    on_the_page = [resolve(name) for name in documented()]
    missing = [name for name in quailora.__all__ if not any(getattr(quailora, name) is value for value in on_the_page)]
    assert len(quailora.__all__) >= 25
    assert missing == []


def test_nothing_is_documented_twice():
    counts = Counter(id(resolve(name)) for name in documented())
    assert [name for name in documented() if counts[id(resolve(name))] > 1] == []


def test_names_at_top_level_are_those_that_type_checkers_see():
    """They are imported when they are first used, so the list for type checkers is another one."""
    tree = ast.parse((ROOT / "quailora" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in checked.body for name in node.names}
    assert sorted(seen) == sorted(quailora.__all__)
    for name, module in seen.items():
        assert getattr(quailora, name) is resolve(f"quailora.{module}.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'Optimum'"):
        _ = quailora.Optimum


@pytest.mark.parametrize("page", PAGES)
def test_the_names_on_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in sorted(set(NAME.findall(text)) - NO_NAMES):
        resolve(name)


def test_a_name_that_does_not_exist_is_found():
    assert resolve("quailora.solvers.base.finish") is quailora.solvers.base.finish
    for name in ("quailora.Optimum", "quailora.solver.Optimal", "quailora.Optimal.solves"):
        with pytest.raises((ImportError, AttributeError), match=r"No module named|has no attribute"):
            resolve(name)
