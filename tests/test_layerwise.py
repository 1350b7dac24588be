"""Several methods over all layers at once, against each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quailora import GPTQ, NF4, SVD, AlternatingLeastSquares, Initializer, InputStatistics, Optimal, Zero
from quailora.adapters.lora import LoraScaling
from quailora.calibration.walk import Block, Walk
from quailora.errors import ConfigurationError, NumericalError
from quailora.methods.method import Method
from quailora.methods.recipes import RECIPES
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import load_model
from quailora.pipeline.layerwise import run_methods

METHODS = {
    "low": Method(Initializer(NF4(), Optimal()), LoraScaling(2)),
    "high": Method(Initializer(NF4(), Optimal()), LoraScaling(6, rank_pattern={"b": 4})),
    "svd": Method(Initializer(NF4(), SVD(), metric="diagonal"), LoraScaling(3)),
    "als": Method(Initializer(GPTQ(), AlternatingLeastSquares()), LoraScaling(4)),
    "zero": Method(Initializer(NF4(), Zero()), LoraScaling(4)),
}


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return {name: Layer(name, nn.Linear(24, 16)) for name in ("a", "b", "c")}


@pytest.fixture
def statistics(generator):
    shared = InputStatistics.from_inputs(torch.randn(99, 24, generator=generator))
    return {"a": shared, "b": shared, "c": InputStatistics.from_inputs(torch.randn(99, 24, generator=generator))}


def block(layers, statistics):
    return [Block(0, layers, dict(statistics), {name: inputs.tokens for name, inputs in statistics.items()})]


def test_methods_together_equal_each_alone(layers, statistics):
    together = run_methods(block(layers, statistics), METHODS, seed=3)
    for name, method in METHODS.items():
        alone = run_methods(block(layers, statistics), {name: method}, seed=3)[name]
        assert [record.name for record in together[name].records] == ["a", "b", "c"]
        for layer, correction in alone.corrections.items():
            found = together[name].corrections[layer]
            assert found.rank == method.scaling.rank_of(layer)
            torch.testing.assert_close(found.dense(), correction.dense(), rtol=1e-4, atol=1e-6)
            if name == "zero":
                torch.testing.assert_close(found.lora_A, correction.lora_A, rtol=0, atol=0)
        for one, other in zip(together[name].records, alone.records, strict=True):
            assert one.error == pytest.approx(other.error, rel=1e-5)
            assert one.error_optimal == pytest.approx(other.error_optimal, rel=1e-5)


def test_a_layer_is_quantized_once_for_all_methods_and_its_work_is_freed(layers, statistics, monkeypatch):
    calls = []
    original = NF4.encode
    monkeypatch.setattr(NF4, "encode", lambda self, *arguments: calls.append(1) or original(self, *arguments))
    run_methods(block(layers, statistics), METHODS)
    assert len(calls) == len(layers)
    assert all(inputs.cached("gram", lambda: "freed") == "freed" for inputs in statistics.values())


def test_the_layer_that_fails_is_named(layers, statistics):
    with torch.no_grad():
        layers["b"].module.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="Layer b: Expected finite weights"):
        run_methods(block(layers, statistics), METHODS)


def test_what_needs_the_whole_pipeline_is_refused(tiny_llama):
    """Other inputs need replaced weights on the way, and a training needs the model afterwards."""
    loaded = load_model(str(tiny_llama))
    layers = linear_layers(loaded.model)
    windows = torch.zeros(4, 8, dtype=torch.long)
    for inputs in ("quantized", "asymmetric"):
        with pytest.raises(ConfigurationError, match="got a walk on other inputs"):
            run_methods(Walk(loaded.model, layers, windows, inputs=inputs), METHODS)
    trained = {"rilq": RECIPES["rilq"].method(NF4(), LoraScaling(4))}
    with pytest.raises(ConfigurationError, match="got the training of 'rilq'"):
        run_methods(Walk(loaded.model, layers, windows), trained)
