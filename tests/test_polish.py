"""Training of the whole model: against stock arithmetic, what it leaves behind, errors."""

from __future__ import annotations

import pytest
import torch
from helpers import init
from torch.nn import functional

from quailora import SVD, Initializer, Uniform
from quailora.calibration.sources import TextCalibration
from quailora.calibration.windows import Calibration
from quailora.core.objective import Factors
from quailora.errors import ConfigurationError, NumericalError
from quailora.evaluation.scores import Corrected, measure
from quailora.families.lora import lora_correction
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
