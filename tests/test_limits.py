"""Positions and token ids that a model has, and losses that no exponential holds."""

from __future__ import annotations

import math

import pytest
import torch
from families import save_llama
from helpers import compare, evaluate, init

from quailora import GPTQ
from quailora.errors import CalibrationError, ModelError
from quailora.evaluation.scores import perplexity_of
from quailora.evaluation.texts import distinct_names
from quailora.models.limits import check_token_ids, fitting_length, longest_sequence
from quailora.models.load import empty_model


def small(family, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, **options)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "options", "longest"),
    [
        ("llama", {"max_position_embeddings": 40, "intermediate_size": 32}, 40),
        ("opt", {"max_position_embeddings": 40, "ffn_dim": 32, "word_embed_proj_dim": 32}, 40),
        ("roberta", {"max_position_embeddings": 40, "intermediate_size": 32, "is_decoder": True}, 38),
        ("gpt2", {"n_positions": 40}, 40),
        ("bloom", {}, None),
        ("xlnet", {"d_inner": 32, "d_head": 16}, None),
    ],
)
def test_the_longest_sequence_is_what_the_model_can_run(family, options, longest):
    model = small(family, **options)
    assert longest_sequence(model) == longest
    assert fitting_length(model, None, 50) == (longest or 50)
    assert fitting_length(model, 7, 50) == 7
    with torch.inference_mode():
        model(torch.full((1, longest or 50), 5))
    if longest is not None:
        with pytest.raises(ModelError, match=f"at most {longest} for this model, got 50"):
            fitting_length(model, 50, 50)


def test_default_lengths_fit_the_model(tiny_llama, tmp_path, caplog):
    """The tiny model has 256 positions; the defaults are 1024 and 2048 tokens."""
    caplog.set_level("INFO", logger="quailora")
    found = evaluate(str(tiny_llama), windows=1).results["quantized"]
    assert found.tokens == 255
    assert "Windows have 256 tokens" in caplog.text
    needed = init(str(tiny_llama), out=str(tmp_path / "a"), dry_run=True)
    assert needed.disk > 0
    with pytest.raises(ModelError, match="at most 256 for this model, got 2048"):
        evaluate(str(tiny_llama), windows=1, sequence_length=2048)


def test_few_tokens_are_told_before_anything_runs(tiny_llama, tmp_path, caplog):
    init(str(tiny_llama), out=str(tmp_path / "a"), samples=1, sequence_length=95, dry_run=True)
    assert "Calibrating on 95 tokens, fewer than the 96 inputs of model.layers.0.mlp.down_proj" in caplog.text
    caplog.clear()
    init(str(tiny_llama), out=str(tmp_path / "a"), samples=2, sequence_length=48, dry_run=True)
    assert "fewer than" not in caplog.text


@pytest.fixture
def short_embedding(tokenizer, tmp_path):
    """A model whose tokenizer has more tokens than its embedding has rows."""
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "short", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(290)
    model.save_pretrained(folder)
    return str(folder)


def test_unknown_token_ids_are_refused_before_the_model_runs(short_embedding, tmp_path, tokenizer):
    message = r"Expected token ids below 290, .* gives the id 29\d to a token of this text"
    few = {"samples": 2, "sequence_length": 64}
    with pytest.raises(CalibrationError, match=message):
        init(short_embedding, out=str(tmp_path / "a"), **few)
    with pytest.raises(CalibrationError, match=message):
        evaluate(short_embedding, windows=1, sequence_length=64)
    with pytest.raises(CalibrationError, match=message):
        compare(short_embedding, out=str(tmp_path / "c"), recipes=("lorc",), windows=1, window_length=64, **few)
    windows = torch.tensor([[0, 289]])
    assert check_token_ids(empty_model(short_embedding), windows) is windows


def test_texts_are_read_before_a_model_is_loaded(tmp_path):
    """There is no model, so whoever loads it first says so."""
    nothing, text = str(tmp_path / "no-model"), str(tmp_path / "no-text.jsonl")
    for run in (
        lambda: init(nothing, out=str(tmp_path / "a"), calibration=text, dry_run=True),
        lambda: evaluate(nothing, text=text),
        lambda: evaluate(nothing, quantizer=GPTQ(), calibration=text),
        lambda: compare(nothing, out=str(tmp_path / "c"), calibration=text),
        lambda: compare(nothing, out=str(tmp_path / "c"), text=[text]),
    ):
        with pytest.raises(CalibrationError, match=r"no-text.jsonl' does not exist"):
            run()


def test_perplexities_beyond_floating_point_are_infinite():
    assert perplexity_of([2.0, 4.0]) == pytest.approx(math.exp(3.0))
    assert perplexity_of([709.0, 712.0]) == math.inf
    assert math.isnan(perplexity_of([math.nan, 1.0]))


def test_a_loud_model_is_evaluated_and_compared(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "loud", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 1e5
    model.save_pretrained(folder)
    found = evaluate(str(folder), windows=1, sequence_length=64)
    assert {result.perplexity for result in found.results.values()} == {math.inf}
    found.show()
    few = {"samples": 2, "sequence_length": 64, "windows": 2, "window_length": 64, "baselines": ("int8",)}
    compared = compare(str(folder), out=str(tmp_path / "c"), recipes=("lorc",), **few)
    assert compared.gap_closed(compared.rows[-1], "shipped text") is None
    assert (tmp_path / "c" / "report.html").is_file()


def test_texts_of_the_same_name_are_told_apart():
    assert distinct_names(["p/a.txt", "q/b.txt"]) == {"a": "p/a.txt", "b": "q/b.txt"}
    assert distinct_names(["p/t.txt", "q/t.txt"]) == {"p/t.txt": "p/t.txt", "q/t.txt": "q/t.txt"}
    assert list(distinct_names(["t.txt", "t.jsonl"])) == ["t.txt", "t.jsonl"]
    assert list(distinct_names(["/x/p/t.txt", "/y/p/t.txt", "/y/p/u.txt"])) == ["x/p/t.txt", "y/p/t.txt", "y/p/u.txt"]
    assert list(distinct_names(["t.txt", "p/t.txt", "t.txt"])) == ["t.txt", "p/t.txt"]
    assert distinct_names([]) == {}
