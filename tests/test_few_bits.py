"""The experiment on few bits: its jobs, that it goes on, and its table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from runs import stopped_after_a_block

from experiments import few_bits
from experiments.few_bits import FewBits, jobs
from experiments.few_bits_tables import draw
from experiments.scored import Size
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import RECIPES

PAGE = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("models", "blocks"))
JOB = "2 bits, groups of 32/block-trained-joint/4/0"


@pytest.fixture
def experiment(tiny_llama, tmp_path, monkeypatch):
    """One job on a tiny model and small texts."""
    for name in ("wikitext2_valid.txt", "wikitext2_raw_test.txt"):
        (tmp_path / name).write_text(" ".join(["river", "stone", "light", "under", "water"] * 900), encoding="utf-8")
    (tmp_path / "c4_300.jsonl").write_text('{"text": "' + "small house " * 900 + '"}\n', encoding="utf-8")
    short = replace(RECIPES["block-trained-joint"], blocks=BlockTraining(3, 64, parts=("scales", "factors")))
    monkeypatch.setitem(RECIPES, "block-trained-joint", short)
    monkeypatch.setattr(few_bits, "STEPS", 2)
    monkeypatch.setattr(few_bits, "jobs", lambda: [JOB, "2 bits, groups of 32/blocks/4/0"])
    monkeypatch.setattr(few_bits, "BLOCKS", {"short": BlockTraining(2, 64)})
    return FewBits(tmp_path, tmp_path / "runs", tmp_path / "results", "cpu", str(tiny_llama), Size(8, 32, 2, 64))


def test_a_job_goes_on_and_is_scored_at_each_stage(experiment, tmp_path, monkeypatch):
    with stopped_after_a_block(monkeypatch):
        experiment.run()
    assert experiment._store.rows() == []
    experiment.run()
    experiment.run()
    row, block = experiment._store.rows()
    assert block["blocks"].keys() == {"short"}
    assert row["scores"].keys() == {"full", "undistilled", "distilled"}
    assert all(len(numbers) == 2 for scores in row["scores"].values() for numbers in scores.values())
    assert max(row["scores"]["full"]["wikitext2 kl"]) < 1e-6 < min(row["scores"]["undistilled"]["wikitext2 kl"])
    assert len(row["blocks"]) == 2
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    experiment.draw(page)
    assert "| 2 bits, groups of 32 | `block-trained-joint` + distillation | 4 |" in page.read_text(encoding="utf-8")


def test_the_table_has_the_means_over_seeds(tmp_path):
    def row(seed, loss):
        scores = {"wikitext2": [loss, loss], "wikitext2 kl": [0.5, 0.5], "c4": [loss, loss], "c4 kl": [0.5, 0.5]}
        stages = {"full": scores, "undistilled": scores, "distilled": scores}
        content = {"bytes": 1e6, "adapter": 500_000, "seconds": 120, "blocks": []}
        return {"key": f"2 bits, groups of 64/best-joint/16/{seed}", "scores": stages, **content}

    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    draw([row(0, math.log(10)), row(1, math.log(40))], page)
    text = page.read_text(encoding="utf-8")
    assert "<!-- begin blocks -->\n\nNothing of this table has been measured yet." in text
    assert "| 2 bits, groups of 64 | `best-joint` | 16 | 2.0 | 20.00 (10.00 to 40.00) | 0.500 |" in text


def test_no_job_comes_twice():
    assert len(set(jobs())) == len(jobs())
