"""Text sources and token windows."""

from __future__ import annotations

import json

import pytest
import torch

from quailora.calibration import Calibration, TextSource, evaluation_windows, shipped_text, tokenize
from quailora.errors import CalibrationError, ConfigurationError


def windows(tokenizer, text=None, **settings):
    return Calibration(**({"text": text} if text else {}), **settings).windows(tokenizer)


def test_windows_are_drawn_without_overlap_and_by_seed(tokenizer):
    first = windows(tokenizer, samples=8, sequence_length=64)
    assert first.shape == (8, 64)
    torch.testing.assert_close(first, windows(tokenizer, samples=8, sequence_length=64))
    assert not torch.equal(first, windows(tokenizer, samples=8, sequence_length=64, seed=1))
    assert len({tuple(window.tolist()) for window in first}) == 8
    tokens = tokenize(tokenizer, shipped_text("calibrate")).tolist()
    every = {tuple(tokens[i : i + 64]) for i in range(0, len(tokens) - 63, 64)}
    assert all(tuple(window.tolist()) in every for window in first)


def test_evaluation_windows_are_the_first(tokenizer):
    tokens = tokenize(tokenizer, shipped_text("evaluate"))
    chosen = evaluation_windows(tokenizer, [shipped_text("evaluate")], 3, 100)
    torch.testing.assert_close(chosen, tokens[:300].view(3, 100))
    assert len(evaluation_windows(tokenizer, ["word " * 500], 99, 100)) < 99


def test_json_lines_with_chosen_fields(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": "Ask ", "response": f"answer {index}."} for index in range(50)]
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    documents = list(TextSource(str(path), ("prompt", "response")).documents())
    assert documents[:2] == ["Ask answer 0.", "Ask answer 1."]
    with pytest.raises(CalibrationError, match=r"data.jsonl:1 has no field 'text'. It has: prompt, response"):
        list(TextSource(str(path)).documents())
    assert windows(tokenizer, TextSource(str(path), ("response",)), samples=2, sequence_length=32).shape == (2, 32)


def test_broken_json_names_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"data.jsonl:2"):
        list(TextSource(str(path)).documents())


def test_data_set_through_the_datasets_package(tokenizer, tmp_path):
    """A local folder stands for a hub name: the same loader reads both."""
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"Document number {index} of the set."}) for index in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = TextSource(str(tmp_path))
    assert list(source.documents())[1] == "Document number 1 of the set."
    assert windows(tokenizer, source, samples=2, sequence_length=50).shape == (2, 50)
    with pytest.raises(CalibrationError, match="Cannot read split 'nowhere'"):
        list(TextSource(str(tmp_path), split="nowhere").documents())


def test_short_text_says_how_much_is_missing(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Only a few words.", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"at least 16 x 1024 tokens .* got \d+ from .*short.txt"):
        windows(tokenizer, TextSource(str(path)))
    path.write_text(" \n ", encoding="utf-8")
    with pytest.raises(CalibrationError, match="got 0 from"):
        windows(tokenizer, TextSource(str(path)))
    with pytest.raises(CalibrationError, match="a text of at least 100 tokens, got 0"):
        evaluation_windows(tokenizer, [""], 1, 100)
    with pytest.raises(ConfigurationError, match="at least one window of two tokens, got 1 x 1"):
        evaluation_windows(tokenizer, ["text"], 1, 1)


def test_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"'nothing.txt' does not exist"):
        list(TextSource("nothing.txt").documents())
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CalibrationError, match="as UTF-8 text"):
        list(TextSource(str(binary)).documents())
    with pytest.raises(ValueError, match="at least one sample"):
        Calibration(samples=0)


def test_settings_survive_json():
    from dataclasses import asdict

    calibration = Calibration(TextSource("a.jsonl", ("x", "y"), "test"), 3, 5, 7)
    assert Calibration.from_dict(json.loads(json.dumps(asdict(calibration)))) == calibration
