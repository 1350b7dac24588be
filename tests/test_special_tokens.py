"""Special tokens in front of a text, from the tokenizer to the figures, against transformers' own loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import save_llama, with_special_tokens
from helpers import compare, evaluate, init
from transformers import AutoModelForCausalLM, AutoTokenizer

from quailora import GPTQ, Uniform
from quailora.calibration.text import shipped_text
from quailora.calibration.windows import given_tokens

FRONT = [301, 300]  # <eos> <bos>


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A tiny model whose tokenizer puts two special tokens in front of a text, and one behind it."""
    changed = with_special_tokens(tokenizer, "<eos> <bos> $A <eos>")
    return str(save_llama(tmp_path_factory.mktemp("special"), changed))


def own_perplexity(folder, windows, ignored):
    """By transformers' loss, which leaves out labels of -100."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    labels = windows.clone()
    labels[:, :ignored] = -100
    with torch.inference_mode():
        losses = [model(ids[None], labels=wanted[None]).loss for ids, wanted in zip(windows, labels, strict=True)]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_that_of_the_text_after_its_beginning(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(shipped_text("evaluate"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor([[*FRONT, *tokens[:62]], [*FRONT, *tokens[62:124]]])
    few = {"windows": 2, "quantizer": Uniform()}
    found = evaluate(model, sequence_length=64, **few).results["full precision"]
    assert found.perplexity == pytest.approx(own_perplexity(model, windows, 2), rel=1e-5)
    assert found.tokens == 2 * 62
    small = {"samples": 2, "sequence_length": 64, "recipes": ("lorc",), "baselines": ("int8",)}
    row = compare(model, out=str(tmp_path / "c"), window_length=64, **few, **small).rows[0]
    assert row.scores["shipped text"].losses == pytest.approx(found.window_losses, rel=1e-5)

    stream = torch.tensor([*FRONT, *tokens[:126]]).view(2, 64)
    found = evaluate(model, sequence_length=64, bos="stream", **few).results["full precision"]
    assert found.perplexity == pytest.approx(own_perplexity(model, stream, 1), rel=1e-5)
    assert (given_tokens(tokenizer, "every-window"), given_tokens(tokenizer, "stream"), found.tokens) == (2, 1, 126)


@pytest.mark.parametrize("bos", ["every-window", "stream"])
def test_an_adapter_is_evaluated_on_the_base_that_its_windows_made(model, bos, tmp_path, caplog):
    """The base is calibrated, so that other windows make another. Before there was a choice, they were a stream."""
    out = tmp_path / "a"
    few = {"samples": 2, "sequence_length": 64}
    init(model, out=str(out), rank=2, quantizer=GPTQ(group_size=32), bos=bos, **few)
    sidecar = json.loads((out / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["calibration"]["bos"] == bos
    if bos == "stream":
        del sidecar["calibration"]["bos"]
        (out / "quailora.json").write_text(json.dumps(sidecar), encoding="utf-8")
    evaluate(model, adapter=str(out), windows=1, sequence_length=64)
    assert "other codes or scales" not in caplog.text
    sidecar["calibration"]["bos"] = "stream" if bos == "every-window" else "every-window"
    (out / "quailora.json").write_text(json.dumps(sidecar), encoding="utf-8")
    evaluate(model, adapter=str(out), windows=1, sequence_length=64, any_base=True)
    assert "other codes or scales" in caplog.text
