"""Text sources and token windows."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from families import with_special_tokens

from quailora.calibration.capture import has_bfloat16
from quailora.calibration.text import TextSource, shipped_text
from quailora.calibration.text.tokens import tokenize
from quailora.calibration.windows import Calibration, evaluation_windows
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


def test_settings_are_checked():
    with pytest.raises(ValueError, match="at least one sample"):
        Calibration(samples=0)


def test_settings_survive_json():
    calibration = Calibration(TextSource("a.jsonl", ("x", "y"), "test"), 3, 5, 7)
    written = json.loads(json.dumps(asdict(calibration)))
    assert Calibration.from_dict(written) == calibration
    del written["bos"]  # as before there was a choice
    assert Calibration.from_dict(written) == replace(calibration, bos="stream")


@pytest.fixture(params=[("<bos> $A", 1), ("<bos> $A <eos>", 1), ("<eos> <bos> $A <eos>", 2), ("$A <eos>", 0)])
def adding(request, tokenizer):
    """A tokenizer that adds special tokens by itself, and how many go in front; BOS and EOS may be the same."""
    template, count = request.param
    return with_special_tokens(tokenizer, template), count


def test_every_window_starts_as_the_tokenizer_starts_a_text(adding, tokenizer):
    changed, count = adding
    front = changed("a")["input_ids"][:count]
    text = tokenize(tokenizer, shipped_text("evaluate"))
    chosen = evaluation_windows(changed, [shipped_text("evaluate")], 5, 64)
    assert chosen[:, :count].tolist() == [front] * 5
    torch.testing.assert_close(chosen[:, count:].flatten(), text[: 5 * (64 - count)])  # no token lost, none in between
    drawn = windows(changed, samples=4, sequence_length=32)
    repeated = Calibration(samples=1, sequence_length=32).repeated(changed, 9)
    for found in (drawn, repeated):
        assert found[:, :count].tolist() == [front] * len(found)
        assert int(found[:, count:].max()) < 300  # no special token anywhere else


def test_a_stream_has_them_once(adding):
    changed, count = adding
    tokens = torch.tensor(changed(shipped_text("evaluate"), verbose=False)["input_ids"])
    torch.testing.assert_close(
        evaluation_windows(changed, [shipped_text("evaluate")], 3, 64, "stream"), tokens[:192].view(3, 64)
    )
    drawn = windows(changed, samples=200, sequence_length=32, bos="stream")
    assert int((drawn[:, :count] >= 300).sum()) <= 2


def test_without_special_tokens_both_are_the_same(tokenizer):
    for choice in ("every-window", "stream"):
        torch.testing.assert_close(
            windows(tokenizer, samples=8, sequence_length=64, bos=choice), drawn_before(tokenizer, 8, 64)
        )


def drawn_before(tokenizer, samples, length):
    """The windows as they were drawn before there was a choice."""
    tokens = torch.tensor(tokenizer(shipped_text("calibrate")[: samples * length * 64])["input_ids"])
    every = tokens[: len(tokens) // length * length].view(-1, length)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:samples]
    return every[chosen.sort().values]


def test_windows_of_special_tokens_alone_are_refused(adding):
    changed, count = adding
    if count == 0:
        assert windows(changed, samples=1, sequence_length=1).shape == (1, 1)
        return
    with pytest.raises(ConfigurationError, match=f"longer than the {count} special tokens"):
        windows(changed, samples=1, sequence_length=count)


def test_no_more_is_read_than_is_needed(tokenizer):
    """A data set may be endless."""
    documents = itertools.repeat("Once upon a time. " * 10)
    assert evaluation_windows(tokenizer, documents, 2, 32).shape == (2, 32)


@pytest.mark.parametrize(
    ("kernels", "instructions", "expected"),
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"avx512_bf16": False}, False),
        ("AVX2", {"avx512_bf16": True, "amx_bf16": True}, False),
        ("DEFAULT", {"amx_bf16": True}, False),
        ("DEFAULT", {"bf16": True}, True),  # of ARM
    ],
)
def test_bfloat16_is_used_where_torch_makes_use_of_it(kernels, instructions, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert has_bfloat16() == expected
