"""The figures of the package: no long file, no long function, everything annotated."""

from __future__ import annotations

import sys

import house
import pytest
from house import PACKAGE, measure, row

OURS = measure(PACKAGE)


def test_no_file_has_more_than_300_lines():
    assert len(OURS.files) > 100
    assert {place: lines for place, lines in OURS.files.items() if lines > 300} == {}


def test_no_function_has_more_than_60_lines():
    assert len(OURS.functions) > 500
    assert [(each.place, each.name, each.lines) for each in OURS.long] == []


def test_every_function_is_annotated():
    assert [(each.place, each.name) for each in OURS.unannotated] == []


def test_no_public_function_has_more_than_12_parameters():
    assert [(each.place, each.name, each.parameters) for each in OURS.crowded] == []


def test_there_are_enough_comments_and_not_too_many():
    """Those for tools explain nothing, and do not count here."""
    share = (OURS.comments - OURS.directives) / OURS.lines
    assert 0.03 <= share <= 0.08, f"{share:.1%} of the lines have a comment"


SMALL = '''"""A module.

Of five lines.
"""

LIMIT = 3  # a comment
"""No docstring in this sense."""


class Thing:
    """One line."""

    def method(self, first: int, *rest: int) -> int:  # noqa: D102
        return first

    def _hidden(self, {many}) -> None:
        # A comment
        def inside(x): return x


def long(x) -> int:
    """Not counted."""
    x = 1
{body}
    return x
'''


@pytest.fixture
def small(tmp_path):
    """A package with a known number of everything."""
    many = ", ".join(f"a{number}: int" for number in range(13))
    text = SMALL.format(many=many, body="    x += 1\n" * 59)
    (tmp_path / "package" / "cli").mkdir(parents=True)
    (tmp_path / "package" / "one.py").write_text(text, encoding="utf-8")
    (tmp_path / "package" / "cli" / "two.py").write_text(f"def command({many}) -> None: ...\n", encoding="utf-8")
    (tmp_path / "package" / "three.py").write_text(f"class A:\n    def __call__(self, {many}) -> None: ...\n", "utf-8")
    return tmp_path / "package"


def test_a_small_package_is_counted_by_hand(small):
    found = measure(small)
    assert found.files == {"cli/two.py": 1, "one.py": 84, "three.py": 2}
    assert (found.comments, found.directives, found.docstrings) == (3, 1, 6)
    assert [(each.name, each.place, each.lines) for each in found.long] == [("long", "one.py:21", 62)]
    assert [each.name for each in found.unannotated] == ["Thing._hidden.inside", "long"]
    assert [(each.name, each.parameters) for each in found.crowded] == [("A.__call__", 13)]
    assert row(found) | {"median": "2", "biggest file": "84", "longest def": "62 (`long`)"} == row(found)


def test_the_table_has_one_row_a_folder(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py", str(PACKAGE), str(small)])
    house.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| ", "| ---", "| quailora", "| package"]
    assert len({line.count(" | ") for line in lines}) == 1


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected a folder with Python files, got "):
        measure(tmp_path)
