"""The experiment on budgets: its jobs, the bytes of their models, and its tables."""

from __future__ import annotations

import pytest

from experiments import budgets
from experiments.budgets import Budgets, jobs
from experiments.budgets_tables import draw
from experiments.scored import Size
from quailora import Uniform
from quailora.budget import costs
from quailora.cli.main import main

PAGE = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("models", "differences"))
JOBS = ["6/plan/0", "6/4 bits/0", "6/skips/0"]


@pytest.fixture
def experiment(tiny_llama, tmp_path, monkeypatch):
    """A plan of a tiny model, small texts, and one budget."""
    for name in ("wikitext2_valid.txt", "wikitext2_raw_test.txt"):
        (tmp_path / name).write_text(" ".join(["river", "stone", "light", "under", "water"] * 900), encoding="utf-8")
    (tmp_path / "c4_300.jsonl").write_text('{"text": "' + "small house " * 900 + '"}\n', encoding="utf-8")
    monkeypatch.setattr(costs, "PASSES", 12)
    measured = tmp_path / "plans/gptq"
    words = ["--bits", "3", "4", "16", "--ranks", "0", "2", "4", "--group-sizes", "32", "--samples", "8"]
    words += ["--sequence-length", "32"]
    assert main(["plan", str(tiny_llama), "--budget", "6bits", "--out", str(measured), *words]) == 0
    monkeypatch.setattr(budgets, "jobs", lambda: JOBS)
    monkeypatch.setitem(budgets.BASES, "4 bits", Uniform(4, 32))
    places = (measured.parent, tmp_path, tmp_path / "runs", tmp_path / "results")
    return Budgets(*places, "cpu", str(tiny_llama), Size(8, 32, 2, 64))


def test_all_models_of_a_budget_stay_within_it(experiment, tmp_path, tiny_llama):
    experiment.run()
    experiment.run()
    rows = {row["key"]: row for row in experiment._store.rows()}
    assert list(rows) == JOBS
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    for row in rows.values():
        bits = 8 * (row["bytes"] + 2 * row["adapter"]) / weights
        assert 4.6 <= bits <= 6.001
        assert max(row["scores"]["full"]["c4 kl"]) < 1e-6 < min(row["scores"]["made"]["c4 kl"])
    assert rows["6/skips/0"]["adapter"] == 0
    assert rows["6/4 bits/0"]["rank"] >= 2
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    experiment.draw(page)
    text = page.read_text(encoding="utf-8")
    assert "| 6 bits | **plan** (" in text
    assert "| 6 bits | 16-bit skips alone (" in text
    assert "nothing" not in text.lower()


def test_tables_pair_plans_with_the_same_windows(tmp_path):
    """A divergence that is a quarter lower in each window has an interval of no width."""

    def row(what, factor):
        losses = {"wikitext2": [1.0, 2.0], "c4": [1.0, 2.0]}
        scores = losses | {"wikitext2 kl": [0.1 * factor, 0.3 * factor], "c4 kl": [0.2 * factor, 0.2 * factor]}
        content = {"bytes": 1e6, "adapter": 0, "seconds": 60, "layers": {"4 bits": 210}, "rank": 8}
        return {"key": f"3.5/{what}/0", "scores": {"full": losses, "made": scores}, **content}

    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    draw([row("3 bits", 1.0), row("plan", 0.75)], page)
    text = page.read_text(encoding="utf-8")
    assert "| 3.5 bits | plan | 3 bits + rank 8 | -25 (-25 to -25) % | -25 (-25 to -25) % | 1 |" in text
    assert text.index("**plan** (210 x 4 bits)") < text.index("| 3 bits + rank 8 | 1.0")


def test_no_job_comes_twice():
    assert len(set(jobs())) == len(jobs())
    assert {job.split("/")[1] for job in jobs() if job.startswith("3.5")} == {"plan", "2 bits", "3 bits", "skips"}
