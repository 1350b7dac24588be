"""Scores of the evaluation harness in a comparison: against likelihoods by hand, and without the harness."""

from __future__ import annotations

import csv
import shutil
import sys

import pytest
import torch
from helpers import compare
from questions import QUESTIONS, save_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from quailora import Uniform
from quailora.errors import ConfigurationError
from quailora.evaluation.tasks import Tasks

SMALL = {"samples": 4, "sequence_length": 64, "windows": 2, "window_length": 64, "ranks": (2,), "baselines": ("int8",)}


@pytest.fixture
def model_with_end(tiny_llama, tmp_path):
    """The tiny model, its tokenizer with an end token, which the harness asks for."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def folder(tmp_path):
    """A task of the harness on a local file."""
    save_task(tmp_path)
    return tmp_path


def test_scores_are_those_of_likelihoods_by_hand(folder, model_with_end):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    options = {"quantizer": Uniform(bits=2, group_size=32), "tasks": ["questions"], "task_folder": str(folder), **SMALL}
    comparison = compare(model_with_end, out=str(folder / "out"), recipes=["qera-exact"], **options)
    model, tokenizer = (each.from_pretrained(model_with_end) for each in (AutoModelForCausalLM, AutoTokenizer))
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            whole, start = (
                tokenizer(text)["input_ids"] for text in (f"{question['query']} {choice}", question["query"])
            )
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(scores[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        right += likelihoods.index(max(likelihoods)) == question["gold"]
    rows = {row.name: row for row in comparison.rows}
    assert rows["full precision"].tasks == {"questions": pytest.approx(right / len(QUESTIONS))}
    assert all(0 <= row.tasks["questions"] <= 1 for row in comparison.rows)
    with (folder / "out" / "results.csv").open(encoding="utf-8") as file:
        assert {record["row"] for record in csv.DictReader(file) if record["questions"]} == set(rows)
    assert "questions" in (folder / "out" / "results.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError, match="lm-eval knows no task 'riddles'"):
        compare(model_with_end, out=str(folder / "other"), tasks=["riddles"], **SMALL)


def test_tasks_without_the_harness_say_how_to_get_it(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigurationError, match=r"Tasks need lm-eval .*: pip install 'quailora\[tasks\]'"):
        compare(str(tiny_llama), out=str(tmp_path), tasks=["piqa"], **SMALL)
    assert not list(tmp_path.iterdir())


def test_no_tasks_need_no_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    Tasks().check()
    assert Tasks().scores(None, None) == {}
