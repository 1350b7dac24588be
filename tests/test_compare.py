"""`quailora compare`: rows against independent measurements, resuming, files, errors."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from families import save_llama
from helpers import compare, evaluate, init
from peft import PeftModel
from scipy import stats
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from quailora import SVD, Uniform
from quailora.calibration.text import shipped_text
from quailora.calibration.windows import evaluation_windows
from quailora.comparison.html import html_table, report
from quailora.comparison.runner import ComparisonRunner
from quailora.comparison.store import RowStore
from quailora.errors import ConfigurationError, ModelError, ResumeError
from quailora.evaluation.scores import Difference, Scores, log_probabilities, score
from quailora.methods.recipes import RECIPES
from quailora.models.layers import linear_layers
from quailora.models.load import load_model

SMALL = {"samples": 8, "sequence_length": 64, "windows": 3, "window_length": 128}

TWO = ("quailora", "qera-exact")


@pytest.fixture(scope="module")
def everything(tiny_llama, tmp_path_factory):
    """All recipes on the tiny model at 3 bits, two of them at two ranks."""
    folder = tmp_path_factory.mktemp("comparison")
    base = Uniform(bits=3, group_size=32)
    with pytest.MonkeyPatch.context() as patch:
        for name, row in list(RECIPES.items()):
            if row.distillation is not None:
                patch.setitem(RECIPES, name, replace(row, distillation=replace(row.distillation, steps=3)))
            if row.blocks is not None:
                patch.setitem(RECIPES, name, replace(row, blocks=replace(row.blocks, steps=5)))
        compare(str(tiny_llama), recipes=TWO, out=str(folder), ranks=(2,), quantizer=base, **SMALL)
        return folder, compare(str(tiny_llama), out=str(folder), ranks=(4,), quantizer=base, **SMALL)


def test_every_recipe_has_a_row_and_other_ranks_are_added(everything):
    folder, comparison = everything
    expected = {f"{name} r4" for name in RECIPES} | {f"{name} r2" for name in TWO}
    found = {row.name: row for row in comparison.rows}
    assert expected <= set(found)
    assert {"full precision", "base alone", "int8", "5-bit"} <= set(found)
    assert found["full precision"].scores["shipped text"].divergence == pytest.approx(0, abs=1e-7)
    assert found["6-bit"].scores["shipped text"].divergence < found["base alone"].scores["shipped text"].divergence
    for row in comparison.rows:
        assert row.scores["shipped text"].divergence >= -1e-7
        assert len(row.scores["shipped text"].losses) == 3
    assert not list((folder / "work").glob("*/run-*"))


def test_rows_equal_evaluating_the_adapter(everything, tiny_llama, tmp_path):
    """A row of each kind against `init --recipe`, stock PEFT and `evaluate`."""
    _, comparison = everything
    rows = {row.name: row for row in comparison.rows}
    common = {"samples": 8, "sequence_length": 64, "rank": 4, "quantizer": Uniform(bits=3, group_size=32)}
    for name in ("qera-exact", "caldera", "asymmetric", "eora", "lq-lora", "asymmetric-half-srr"):
        init(str(tiny_llama), out=str(tmp_path / name), recipe=name, save_base=True, **common)
        found = evaluate(str(tiny_llama), adapter=str(tmp_path / name), windows=3, sequence_length=128).results
        row = rows[f"{name} r4"].scores["shipped text"]
        assert row.perplexity == pytest.approx(found["quantized + adapter"].perplexity, rel=1e-5)
        full = rows["full precision"].scores["shipped text"].perplexity
        assert full == pytest.approx(found["full precision"].perplexity, rel=1e-6)


def test_training_starts_from_what_a_walk_has_made(everything):
    """Rows that differ in a training share their walk, and differ in nothing before it."""
    _, comparison = everything
    rows = {row.name: row for row in comparison.rows}
    for start, *trained in (("asymmetric-half r4", "distilled r4", "fine-tuned r4"), ("qlora r4", "rilq r4")):
        for name in trained:
            assert rows[name].layers == rows[start].layers
            assert rows[name].scores != rows[start].scores
            assert rows[name].seconds > rows[start].seconds


def test_bytes_are_those_of_the_files(everything):
    _, comparison = everything
    row = next(row for row in comparison.rows if row.name == "quailora r4")
    shapes = [layer.shape for layer in row.layers]
    assert row.adapter_bytes == sum(2 * 4 * (rows + columns) for rows, columns in shapes)
    assert row.base_bytes == pytest.approx(
        sum(rows * columns for rows, columns in shapes) * row.bits_per_weight / 8, abs=1
    )
    alone = next(row for row in comparison.rows if row.name == "base alone")
    assert (alone.adapter_bytes, alone.base_bytes) == (0, row.base_bytes)


def test_spectra_add_up_to_what_is_gained(everything):
    _, comparison = everything
    rows = {row.name: row for row in comparison.rows}
    row = rows["qera-exact r4"]
    gained = [1 - layer.error / layer.error_none for layer in row.layers]
    assert row.spectrum[-1] == pytest.approx(sum(gained) / len(gained), rel=1e-4)
    assert list(row.spectrum) == sorted(row.spectrum)
    assert rows["lorc r4"].spectrum == ()


def test_files(everything):
    folder, comparison = everything
    records = list(csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert len(records) == len(comparison.rows)
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in content["rows"]] == [row.name for row in comparison.rows]
    lines = (folder / "results.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(comparison.rows) + 2
    page = (folder / "report.html").read_text(encoding="utf-8")
    checker = WellFormed()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen["svg"] == 6
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # nothing is fetched
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(identifiers)


class WellFormed(HTMLParser):
    """Counts tags, and keeps those that are open."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], {}

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_finished_rows_are_kept_and_others_added(tiny_llama, tmp_path, monkeypatch):
    """An interrupted comparison goes on; other settings are refused, and told apart."""
    added = []
    plain = RowStore.add
    monkeypatch.setattr(RowStore, "add", lambda self, row: (added.append(row.name), plain(self, row)))
    options = {"out": str(tmp_path), "ranks": (2,), **SMALL}
    first = compare(str(tiny_llama), recipes=["qera-exact"], **options)
    assert added[-2:] == ["quailora r2", "qera-exact r2"]
    added.clear()
    second = compare(str(tiny_llama), recipes=["lorc"], **options)
    assert added == ["lorc r2"]
    assert [row.name for row in second.rows if row.recipe] == ["lorc r2", "qera-exact r2", "quailora r2"]
    kept = {row.name: row for row in first.rows}
    assert all(kept[row.name] == row for row in second.rows if row.name in kept)
    monkeypatch.setitem(RECIPES, "lorc", replace(RECIPES["lorc"], solver=SVD(tolerance=1e-4)))
    added.clear()
    compare(str(tiny_llama), recipes=["lorc"], **options)
    assert added == ["lorc r2"]  # whose definition has changed
    monkeypatch.setitem(RECIPES, "lorc", replace(RECIPES["lorc"], solver=SVD(tolerance=1e-5)))
    third = compare(str(tiny_llama), recipes=["quailora"], **options)
    assert [row.name for row in third.rows if row.recipe] == ["qera-exact r2", "quailora r2"]  # lorc is another by now
    with pytest.raises(ResumeError, match=r"rows of another comparison, which differs in seed"):
        compare(str(tiny_llama), recipes=["lorc"], seed=1, **options)
    compare(str(tiny_llama), recipes=["lorc"], seed=1, fresh=True, **options)


def test_an_interrupted_comparison_keeps_the_layers_of_unfinished_rows(tiny_llama, tmp_path, monkeypatch):
    """Solving takes longest, and is over when the rows are scored: an interruption then must not lose it."""
    options = {"out": str(tmp_path), "ranks": (2,), **SMALL}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ComparisonRunner, "_accuracies", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(str(tiny_llama), recipes=["qera-exact"], **options)
        patch.undo()
        patch.setattr(ComparisonRunner, "_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(str(tiny_llama), recipes=["qera-exact"], **options)
    kept = list((tmp_path / "work").rglob("*.safetensors"))
    assert kept
    times = {file: file.stat().st_mtime_ns for file in kept}
    seen = []
    plain = ComparisonRunner._weights
    monkeypatch.setattr(
        ComparisonRunner,
        "_weights",
        lambda self, results: (seen.append({file: file.stat().st_mtime_ns for file in kept}), plain(self, results))[1],
    )
    compare(str(tiny_llama), recipes=["qera-exact"], **options)
    assert seen == [times]  # no layer was made again
    assert not (tmp_path / "work").exists()


def test_two_texts_and_differences(tiny_llama, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, path in enumerate(texts):
        path.write_text("".join(f"The {word} of {number} is here. " for word in range(600)), encoding="utf-8")
    comparison = compare(
        str(tiny_llama), out=str(tmp_path / "out"), recipes=["lorc"], text=[str(path) for path in texts], **SMALL
    )
    assert comparison.texts == ("a", "b")
    rows = {row.name: row for row in comparison.rows}
    for text in comparison.texts:
        found = comparison.difference(rows["lorc r16"], text)
        pairs = [rows[name].scores[text].losses for name in ("lorc r16", "quailora r16")]
        expected = stats.ttest_rel(*pairs)
        assert found.mean == pytest.approx(sum(pairs[0]) / 3 - sum(pairs[1]) / 3)
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
        assert comparison.difference(rows["quailora r16"], text) is None
    comparison.show()


def test_divergence_by_definition(generator):
    first, second = torch.randn(600, 50, generator=generator), torch.randn(600, 50, generator=generator)
    p, q = functional.softmax(first.double(), -1), functional.softmax(second.double(), -1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    ids = torch.arange(600) % 50
    loss, divergence = score(log_probabilities(first), second, ids)
    assert divergence == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(functional.cross_entropy(second, ids).item(), rel=1e-5)
    assert score(log_probabilities(first), first, ids)[1] == pytest.approx(0, abs=1e-9)


def test_differences_of_equal_scores():
    same = Scores((1.0, 2.0, 3.0), (0.0, 0.0, 0.0))
    other = Scores((1.5, 2.5, 3.7), (0.0, 0.0, 0.0))
    found = Difference.between(other, same)
    assert found.mean == pytest.approx(1.7 / 3)
    assert 0 < found.low < found.mean < found.high
    assert math.exp(2.0) == pytest.approx(same.perplexity)


def test_bad_input_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigurationError, match=r"Unknown recipe 'lorca'. Expected one of qlora"):
        compare(str(tiny_llama), out=str(tmp_path), recipes=["lorca"], **SMALL)
    with pytest.raises(ConfigurationError, match=r"Unknown baseline '7-bit'. Expected some of int8, 6-bit"):
        compare(str(tiny_llama), out=str(tmp_path), baselines=["7-bit"], **SMALL)
    with pytest.raises(ConfigurationError, match="A recipe decides solver, metric and inputs"):
        init(str(tiny_llama), out=str(tmp_path), recipe="lorc", inputs="quantized")


@pytest.fixture
def whole_blocks(tmp_path, tokenizer):
    """A Llama whose widths are multiples of 64, which bitsandbytes' inference on a CPU asks for."""
    return save_llama(tmp_path / "model", tokenizer)


@pytest.mark.parametrize(
    "name", ["cloq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loftq", "asymmetric-half-srr"))]
)
def test_a_changed_nf4_base_is_a_stock_checkpoint(name, whole_blocks, tmp_path):
    """Written beside the adapter in 4 bits, it loads without quailora and computes what the row was measured with."""
    from bitsandbytes.nn import Linear4bit

    rows = compare(str(whole_blocks), out=str(tmp_path / "rows"), recipes=[name], ranks=(4,), **SMALL).rows
    measured = next(row for row in rows if row.recipe == name).scores["shipped text"].perplexity
    out = tmp_path / "out"
    init(str(whole_blocks), out=str(out), recipe=name, rank=4, samples=8, sequence_length=64)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    names = linear_layers(load_model(str(whole_blocks)).model)
    assert all(isinstance(base.get_submodule(layer), Linear4bit) for layer in names)
    windows = evaluation_windows(AutoTokenizer.from_pretrained(whole_blocks), [shipped_text("evaluate")], 3, 128)
    model = PeftModel.from_pretrained(base, str(out))
    losses = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]
    assert math.exp(sum(losses) / 3) == pytest.approx(measured, rel=1e-4)
    found = evaluate(str(whole_blocks), adapter=str(out), windows=3, sequence_length=128).results
    assert found["quantized + adapter"].perplexity == pytest.approx(measured, rel=1e-3)  # scales in bfloat16
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "path/to/this/folder/base" in card
    assert "quantization_config" not in card
    shutil.rmtree(out / "base")
    if name == "loftq":
        with pytest.raises(ModelError, match="cannot be made again"):
            evaluate(str(whole_blocks), adapter=str(out), sequence_length=128)


def test_the_report_says_what_is_best_and_what_misleads(everything):
    """Bold is the least KL; a lower perplexity at a larger KL is marked, and the mark is explained."""
    _, comparison = everything
    text = comparison.texts[0]
    first, *others = [row for row in comparison.rows if row.recipe]
    close = replace(first, scores={text: Scores((3.0, 3.2), (0.1, 0.1))})
    learned = replace(others[0], scores={text: Scores((2.5, 2.6), (0.3, 0.3))})
    lucky = replace(others[1], scores={text: Scores((2.9, 3.2), (0.12, 0.12))})
    full = replace(comparison.rows[0], scores={text: Scores((2.8, 2.9), (0.0, 0.0))})
    alone = replace(full, name="base alone", scores={text: Scores((3.3, 3.4), (0.4, 0.4))})
    small = replace(comparison, rows=(full, alone, learned, close, lucky), origin={"command": "quailora compare <x>"})
    assert small.closest(text) is close
    assert [small.misleads(row, text) for row in small.rows] == [False, False, True, False, False]
    page = html_table(small, text)
    assert re.findall(r'class="best"><td>([^<*]+?)(?: \*)?</td>', page) == [close.name]
    assert re.findall(r"<td>([^<]+) †</td>", page) == [learned.name]
    whole = report(small)
    assert whole.index("it has learned the text") < whole.index("<table>")
    assert "<dt>command</dt><dd>quailora compare &lt;x&gt;</dd>" in whole


def test_the_page_has_the_command_that_made_it(everything):
    folder, comparison = everything
    words = "compare {} --out {} --ranks 4 --quantizer uniform --quantizer.bits 3 --quantizer.group_size 32 --windows 3"
    model = comparison.title.partition(",")[0]
    assert comparison.origin["command"].startswith(f"quailora {words.format(model, folder)}")
    assert "torch 2" in comparison.origin["versions"]
    assert comparison.origin["date"] in (folder / "report.html").read_text(encoding="utf-8")


def test_damaged_rows_are_measured_again(tiny_llama, tmp_path, caplog):
    options = {"out": str(tmp_path), "ranks": (2,), "baselines": (), "recipes": ["lorc"], **SMALL}
    first = compare(str(tiny_llama), **options)
    row = tmp_path / "rows" / "lorc-r2.json"
    content = json.loads(row.read_text(encoding="utf-8"))
    content["scores"]["shipped text"]["losses"][0] += 0.1
    row.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "rows" / "quailora-r2.json").write_text("{", encoding="utf-8")
    (tmp_path / "rows" / "full-precision.json").write_text("[]", encoding="utf-8")
    second = compare(str(tiny_llama), **options)
    assert "lorc-r2.json is damaged" in caplog.text
    assert [row.scores for row in second.rows] == [row.scores for row in first.rows]
    for damage in ("{", "[]", None):
        manifest = tmp_path / "rows" / "manifest.json"
        manifest.unlink() if damage is None else manifest.write_text(damage, encoding="utf-8")
        with pytest.raises(ResumeError, match="missing or damaged"):
            compare(str(tiny_llama), **options)
