"""The experiment on few bits: its jobs, that it goes on, and its table."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import stopped_after_a_block

from experiments import few_bits, first_block
from experiments.few_bits import FewBits, jobs
from experiments.few_bits_tables import draw
from experiments.scored import Size
from experiments.signed_steps import MovedWeight
from quailora import Uniform
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import RECIPES
from quailora.models.layers import all_layers
from quailora.quantizers.grid import Grid
from quailora.quantizers.groups import join_groups, split_groups

PAGE = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("models", "rivals", "dial", "blocks"))
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
    trained = replace(few_bits.WITHOUT["bare-trained"], blocks=BlockTraining(3, 64, parts=("codes", "scales")))
    monkeypatch.setitem(few_bits.WITHOUT, "bare-trained", trained)
    monkeypatch.setattr(few_bits, "DIAL", (2, 3))
    monkeypatch.setattr(few_bits, "jobs", lambda: [JOB, "2 bits, groups of 32/blocks/4/0"])
    monkeypatch.setattr(first_block, "BLOCKS", {"short": BlockTraining(2, 64)})
    monkeypatch.setattr(first_block, "ALONE", {"short": BlockTraining(2, 64, parts=("scales",))})
    monkeypatch.setattr(first_block, "SIGNED", {"steps": BlockTraining(40, 64)})
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


def test_a_block_is_trained_in_several_ways(experiment, monkeypatch):
    """All begin with the same closed form; signed steps do so from codes rounded to nearest, and make them better."""
    kinds = [f"2 bits, groups of 32/{kind}/{rank}/0" for rank in (0, 4) for kind in ("blocks", "signed steps")]
    monkeypatch.setattr(few_bits, "jobs", lambda: kinds)
    experiment.run()
    found = {row["key"]: row["blocks"] for row in experiment._store.rows()}
    for ours, signed in (kinds[:2], kinds[2:]):
        assert found[signed]["steps"][0] == pytest.approx(found[ours]["short"][0], rel=1e-3)
    monkeypatch.setattr(first_block, "SIGNED", {"none": BlockTraining(0)})
    monkeypatch.setattr(few_bits, "jobs", lambda: [f"2 bits, groups of 32/signed steps/{rank}/1" for rank in (0, 4)])
    experiment.run()
    nearest = {row["key"]: row["blocks"]["none"][1] for row in experiment._store.rows() if "none" in row["blocks"]}
    for before, after in zip(nearest.values(), (found[kinds[1]], found[kinds[3]]), strict=True):
        assert after["steps"][1] < before


def test_signed_steps_begin_with_what_is_nearest():
    """Up to the precision of scales, which `Uniform` rounds to float16, and to ties that this decides."""
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    moved = MovedWeight(weight, Uniform(2, 32))
    nearest = Uniform(2, 32).quantize(weight).dequantize()
    close = (moved.values() - nearest).abs() < 1e-2
    assert close.float().mean() > 0.99
    torch.autograd.backward((moved.values() * torch.ones(64).scatter(0, torch.arange(0, 64, 2), -1.0)).sum())
    moved.step(0.75)
    assert moved.moves.detach().aminmax() == (-0.5, 0.5)
    assert 0 <= moved.ends.min() < 1 == moved.ends.max()


def test_bases_without_an_adapter_and_distillations_from_one_start(experiment, tmp_path, monkeypatch):
    bare = [f"2 bits, groups of 32/{recipe}/0/0" for recipe in ("bare", "bare-trained")]
    nearest = [f"{base}/nearest/0/0" for base in ("2 bits, groups of 32", "NF4", "int8")]
    dials = ["NF4/best at 0.001/4/0", "NF4/best at 0.0003/4/0"]
    monkeypatch.setattr(few_bits, "jobs", lambda: [*bare, *nearest, *dials])
    experiment.run()
    rows = {row["key"]: row for row in experiment._store.rows()}
    losses = {key: sum(row["scores"]["undistilled"]["wikitext2 kl"]) for key, row in rows.items()}
    assert all(rows[key]["adapter"] == 0 and rows[key]["scores"].keys() == {"full", "undistilled"} for key in bare)
    assert losses[bare[0]] != losses[bare[1]]
    assert losses[nearest[2]] < losses[nearest[1]] < losses[nearest[0]]
    first, second = (rows[key] for key in dials)
    assert first["seconds"].keys() == {"undistilled", "2 steps", "3 steps"}
    assert first["scores"]["undistilled"] == second["scores"]["undistilled"]
    different = [first["scores"]["2 steps"], first["scores"]["3 steps"], second["scores"]["2 steps"]]
    assert len({str(scores) for scores in different}) == 3
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    experiment.draw(page)
    text = page.read_text(encoding="utf-8")
    assert "| 2 bits, groups of 32 | rounded likewise, codes and scales trained by blocks | - |" in text
    assert text.index("| NF4, no adapter |") < text.index("| 0.0003 | 0 |") < text.index("| 0.001 | 2,048 |")


class AutoRound:
    """What the package of this name does, but for the training: it leaves scales and zero points beside the weights."""

    off = 0.0

    def __init__(self, model, tokenizer, **options):
        self.model, self.options = model, options
        assert [len(part["input_ids"]) for part in options["dataset"]] == [8]  # 8 windows, in steps of 1024 tokens

    def quantize(self):
        for layer in all_layers(self.model).values():
            groups = split_groups(layer.weight.detach(), self.options["group_size"])
            grid = Grid.fit(groups, self.options["bits"], self.options["sym"])
            codes = grid.over_groups().encode(groups)
            layer.module.scale, layer.module.zp = grid.scale.half(), grid.zero_point
            rounded = join_groups((grid.over_groups().decode(codes) + self.off), layer.shape[1])
            layer.module.weight.data = rounded.bfloat16().float()
        return self.model, None


def test_bases_of_another_package_are_measured_in_the_same_way(experiment, tmp_path, monkeypatch):
    """Rounded to nearest they are what `Uniform` makes, whatever precision the package leaves the weights in."""
    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=AutoRound))
    jobs = [f"3 bits, groups of 64/{recipe}/0/0" for recipe in ("auto-round", "nearest", "bare-trained")]
    monkeypatch.setattr(few_bits, "jobs", lambda: jobs)
    experiment.run()
    first, second, _ = experiment._store.rows()
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    experiment.draw(page)
    rivals = page.read_text(encoding="utf-8").partition("<!-- begin rivals -->")[2].partition("<!-- end rivals -->")[0]
    assert "| 3 bits, groups of 64 | " in rivals
    assert first["bytes"] == pytest.approx(second["bytes"], rel=1e-6)
    for text in ("wikitext2", "c4"):
        assert first["scores"]["undistilled"][text] == pytest.approx(second["scores"]["undistilled"][text], rel=1e-5)
    monkeypatch.setattr(AutoRound, "off", 0.01)
    monkeypatch.setattr(few_bits, "jobs", lambda: ["2 bits, groups of 64/auto-round/0/0"])
    with pytest.raises(ValueError, match="is not rounded to 2 bits in groups of 64"):
        experiment.run()


def test_the_table_has_the_means_over_seeds(tmp_path):
    def row(seed, loss) -> dict:
        scores = {"wikitext2": [loss, loss], "wikitext2 kl": [0.5, 0.5], "c4": [loss, loss], "c4 kl": [0.5, 0.5]}
        stages = {"full": scores, "undistilled": scores, "distilled": scores}
        content = {
            "bytes": 1e6,
            "adapter": 500_000,
            "seconds": dict.fromkeys(stages, 60),
            "device": "CPU",
            "blocks": [],
        }
        return {"key": f"2 bits, groups of 64/best-joint/16/{seed}", "scores": stages, **content}

    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    first, second = row(0, math.log(10)), row(1, math.log(40))
    draw([first, second], page)
    text = page.read_text(encoding="utf-8")
    assert "| 2 | 1 min, CPU |" in text
    assert "| 2 | 2 min, CPU |" in text  # with the distillation
    for stage in (second["scores"], second["seconds"]):
        del stage["distilled"]  # only the first seed is distilled
    first["seconds"]["distilled"] = None  # a job that went on after a break
    draw([first, second], page)
    text = page.read_text(encoding="utf-8")
    assert "| `best-joint` | 16 | 2.0 | 20.00 (10.00 to 40.00) | 0.500 | 20.00" in text
    assert "| `best-joint` + distillation | 16 | 2.0 | 10.00 (10.00 to 10.00) | 0.500 | 10.00" in text
    assert "| 1 | CPU |" in text
    assert "<!-- begin blocks -->\n\nNothing of this table has been measured yet." in text
    assert "| 2 bits, groups of 64 | `best-joint` | 16 | 2.0 | 20.00 (10.00 to 40.00) | 0.500 |" in text


def test_no_job_comes_twice():
    assert len(set(jobs())) == len(jobs())
