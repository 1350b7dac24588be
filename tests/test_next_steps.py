"""What `init` says at its end is what works."""

from __future__ import annotations

import re
import shlex

import pytest

from quailora.cli.next_steps import next_steps

FAST = ["--samples", "4", "--sequence-length", "64", "--rank", "4"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text of a task.txt"
    file.write_text("Light is what we see by. " * 400, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--quantizer", "uniform", "--save-base"],
        ["--quantizer", "gptq", "--calibration", "TEXT"],
        ["--quantizer", "signs", "--plugin", "third_party", "--save-base"],
    ],
    ids=" ".join,
)
def test_the_commands_that_init_names_work(run, tiny_llama, tmp_path, text, options):
    out = tmp_path / "an adapter"
    options = [str(text) if word == "TEXT" else word for word in options]
    status, _, error = run("init", tiny_llama, "--out", out, *FAST, *options)
    assert status == 0, error
    said = next_steps(out)
    evaluate, check = (shlex.split(line)[1:] for line in re.findall(r"^  (quailora .*)$", said, re.MULTILINE))
    named = [str(text) if word == "TEXT" else word for word in evaluate]
    status, _, error = run(*named, "--windows", "1", "--sequence-length", "64")
    assert status == 0, error
    if "BASE" not in check:
        assert run(*check)[0] == 0
    assert f'PeftModel.from_pretrained(base, "{out}", is_trainable=True)' in said
    assert "path/to/this/folder" not in said


def test_init_ends_with_them(run, tiny_llama, tmp_path):
    status, shown, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST)
    assert status == 0, error
    assert "What comes next:" in shown
    assert f"quailora check {tmp_path / 'a'} --base {tiny_llama}" in " ".join(shown.split())
