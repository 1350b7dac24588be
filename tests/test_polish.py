"""Training of the whole model: against stock arithmetic, what it leaves behind, errors."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import init
from hypothesis import given
from hypothesis import strategies as st
from runs import Killed, content, small_run
from torch.nn import functional

from quailora import SVD, Initializer, Uniform
from quailora.calibration.sources import TextCalibration
from quailora.calibration.windows import Calibration
from quailora.cli.main import main
from quailora.core.objective import Factors
from quailora.errors import ConfigurationError, NumericalError
from quailora.evaluation.scores import Corrected, measure
from quailora.families.lora import lora_correction
from quailora.methods import distillation
from quailora.methods.distillation import Distillation, corrected, next_token_loss
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.models.weights import replaced


def test_distillation_lowers_the_divergence_and_leaves_the_model(tiny_llama, tokenizer):
    """On the text it trains on, in full precision arithmetic, from the closed form."""
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = TextCalibration(Calibration(samples=8, sequence_length=64))
    quantized, factors = {}, {}
    for name, layer in layers.items():
        found = Initializer(Uniform(bits=2), SVD(), 4)(layer.weight)
        quantized[name] = found.quantized.dequantize()
        factors[name] = found.correction
    distillation = Distillation(steps=20, batch=2, sequence_length=64, learning_rate=3e-3)
    windows = distillation.windows(source, tokenizer)
    trained = distillation.train(model, layers, quantized, factors, windows, "model")
    scores = measure(
        model, layers, {"start": Corrected(quantized, factors), "end": Corrected(quantized, trained)}, windows[:8]
    )
    assert scores["end"].divergence < 0.9 * scores["start"].divergence
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_plain_fine_tuning_lowers_the_loss_on_its_text(tiny_llama, tokenizer):
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    factors = {
        name: lora_correction(Factors(torch.zeros(each.shape[0], 4), torch.randn(4, each.shape[1]) / 8))
        for name, each in layers.items()
    }
    distillation = Distillation(steps=20, batch=2, sequence_length=64, learning_rate=3e-3, target="text")
    windows = distillation.windows(TextCalibration(Calibration(samples=8, sequence_length=64)), tokenizer)
    trained = distillation.train(model, layers, weights, factors, windows, "model")
    scores = measure(model, layers, {"start": {}, "end": Corrected(weights, trained)}, windows)
    assert scores["end"].perplexity < 0.95 * scores["start"].perplexity
    ids, logits = torch.arange(10).view(2, 5), torch.randn(2, 5, 20)
    expected = torch.stack([functional.cross_entropy(logits[i, :-1], ids[i, 1:]) for i in range(2)]).mean()
    torch.testing.assert_close(next_token_loss(logits, ids), expected)


def test_the_correction_in_training_is_that_of_the_adapter(tiny_llama):
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: lora_correction(
            Factors(
                torch.randn(layer.shape[0], 3, generator=generator), torch.randn(3, layer.shape[1], generator=generator)
            )
        )
        for name, layer in layers.items()
    }
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    ids = torch.arange(32)[None]
    with torch.no_grad():
        with corrected(layers, factors, weights):
            found = model(ids).logits
        with replaced(layers, Corrected(weights, factors)):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_bad_training_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigurationError, match="has to fit into memory"):
        init(
            str(tiny_llama),
            out=str(tmp_path),
            recipe="polished",
            rank=2,
            offload="always",
            samples=4,
            sequence_length=32,
        )
    with pytest.raises(ConfigurationError, match="got 0 steps of 2 x 512"):
        Distillation(steps=0)
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    weights = {name: layer.weight * float("nan") for name, layer in layers.items()}
    factors = {
        name: lora_correction(Factors(torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1])))
        for name, layer in layers.items()
    }
    distillation = Distillation(steps=1, batch=1, sequence_length=8)
    with pytest.raises(NumericalError, match="The loss of step 1 is nan"):
        distillation.train(model, layers, weights, factors, torch.ones(1, 8).long())


def test_distillation_is_a_dial_of_every_recipe(tiny_llama, tmp_path):
    """On the command line, and again from `config.yaml`; without steps nothing of it is left."""
    small = {"rank": 4, "samples": 8, "sequence_length": 64}
    dial = {"distill": 3, "distill_tokens": 128, "distill_rate": 1e-3}
    init(str(tiny_llama), out=str(tmp_path / "best"), recipe="best", **small)
    init(str(tiny_llama), out=str(tmp_path / "dial"), recipe="best", **small, **dial)
    init(str(tiny_llama), out=str(tmp_path / "off"), recipe="distilled", distill=0, **small)
    adapters = {name: content(tmp_path / name) for name in ("best", "dial", "off")}
    assert adapters["dial"] != adapters["best"] == adapters["off"]
    report = json.loads((tmp_path / "dial/report.json").read_text(encoding="utf-8"))
    said = report["training"]["init_args"]
    assert (said["steps"], said["batch"] * said["sequence_length"], said["learning_rate"]) == (3, 128, 1e-3)
    for name in ("dial", "off"):
        main(["init", "--config", str(tmp_path / name / "config.yaml"), "--out", str(tmp_path / f"{name}-again")])
        assert content(tmp_path / f"{name}-again") == adapters[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_rate": 1e-3}, "steps of a distillation beside its tokens or its learning rate, got none"),
        ({"distill": -1}, "at least one step"),
        ({"distill": 2, "distill_tokens": 1}, "at least two tokens in a step of the distillation, got 1"),
        ({"distill": 2, "distill_rate": 0.0}, "learning rate above 0"),
    ],
)
def test_a_dial_that_says_nothing_is_refused(tiny_llama, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        init(str(tiny_llama), out=str(tmp_path / "out"), recipe="best", rank=4, samples=8, **options)


@given(st.integers(1, 1000), st.integers(2, 5000), st.floats(1e-6, 1))
def test_a_dial_says_what_it_has_set(steps, tokens, rate):
    found = Distillation().asked(steps, tokens, rate)
    assert (found.steps, found.learning_rate) == (steps, rate)
    assert tokens - found.sequence_length < found.tokens <= tokens
    assert found.asked(found.steps, found.tokens, found.learning_rate) == found


@pytest.mark.parametrize("after", [1, 4])
def test_a_distillation_that_was_killed_goes_on(tiny_llama, tmp_path, monkeypatch, after):
    """With the same bytes, from the step where its state was kept last; a state that has changed begins again."""
    options = {"recipe": "distilled", "distill": 6, "distill_tokens": 64}
    small_run(tiny_llama, tmp_path / "whole", **options)
    monkeypatch.setattr(distillation, "_SAVED_SECONDS", -1.0)
    taken = []
    plain = distillation.divergence

    def counted(*logits):
        taken.append(1)
        if len(taken) > after + 1:
            raise Killed
        return plain(*logits)

    for damage in (False, True):
        out = tmp_path / f"killed-{damage}"
        with monkeypatch.context() as patch:
            patch.setattr(distillation, "divergence", counted)
            with pytest.raises(Killed):
                small_run(tiny_llama, out, **options)
        if damage:
            (state,) = tmp_path.glob(f"{out.name}.partial/*/layers/distilling-*/state.safetensors")
            state.write_bytes(state.read_bytes()[:-1] + b"?")
        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(distillation, "divergence", lambda *logits: (taken.append(1), plain(*logits))[1])
            small_run(tiny_llama, out, **options)
        assert len(taken) == (6 if damage else 6 - after - 1)
        assert content(out) == content(tmp_path / "whole")
        taken.clear()
