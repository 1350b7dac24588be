"""What a person sees while a run goes on."""

from __future__ import annotations

import io

import pytest
from helpers import init
from rich.console import Console

from quailora import NF4, Optimal
from quailora.support import progress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that keeps what is written to it."""
    written = io.StringIO()
    seen = Console(file=written, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", seen)
    return written


def test_the_bar_says_which_batch_of_which_block_is_run(tiny_llama, tmp_path, terminal, monkeypatch):
    """Counted are finished layers; a block's forward passes come before its first one."""
    said = []
    plain = progress.counting

    class Told:
        def __init__(self, *arguments):
            self.inner = plain(*arguments)

        def __enter__(self):
            counter = self.inner.__enter__()
            return progress.Counter(
                lambda: said.append("layer"), lambda text: (said.append(text), counter.describe(text))
            )

        def __exit__(self, *reason):
            self.inner.__exit__(*reason)

    monkeypatch.setattr("quailora.pipeline.run.counting", Told)
    init(str(tiny_llama), out=str(tmp_path / "a"), quantizer=NF4(), solver=Optimal(), samples=2, sequence_length=32)
    assert said[:3] == ["Block 0: batch 1", "Block 0: layers", "layer"]
    assert said.count("layer") == 14
    assert "Block 1: batch 1" in said
    assert "Block 1" in terminal.getvalue()


def test_the_summary_says_what_comes_next(tiny_llama, tmp_path, capsys):
    out = tmp_path / "an adapter"
    result = init(str(tiny_llama), out=str(out), samples=2, sequence_length=32)
    capsys.readouterr()
    result.show()
    shown = capsys.readouterr().out
    assert f"quailora evaluate {tiny_llama} --adapter '{out}' --text" in shown
    assert f'"{out}", is_trainable=True)' in shown


def test_a_notebook_shows_a_bar_of_its_own(monkeypatch, capsys):
    """As widgets where there are such, which a test has not, and as text otherwise; and log lines are not needed."""
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_jupyter=True))
    with progress.counting("Measuring", 4, 1) as counter:
        counter.describe("Block 0")
        counter.advance()
    seen = capsys.readouterr().err
    assert "Block 0:  50%" in seen
    assert "2/4" in seen
    assert progress.watched()
    with progress.shown(False), progress.counting("Measuring", 4) as counter:
        counter.advance()
        assert not progress.watched()
    assert capsys.readouterr().err == ""


def test_nobody_watches_a_file(monkeypatch, capsys):
    monkeypatch.setattr(progress, "console", Console(stderr=True))
    assert list(progress.track([1, 2], "Counting")) == [1, 2]
    assert not progress.watched()
    assert capsys.readouterr().err == ""
