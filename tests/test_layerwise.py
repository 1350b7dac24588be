"""Several methods over all layers at once, against each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quailora import GPTQ, NF4, SVD, AlternatingLeastSquares, Initializer, InputStatistics, Optimal, Zero
from quailora.adapters.lora import LoraScaling
from quailora.calibration.collector import LayerInputs
from quailora.calibration.walk import Block
from quailora.core.weightings import DiagonalWeighting
from quailora.errors import NumericalError
from quailora.methods.method import Method
from quailora.models.layers import Layer
from quailora.pipeline.layerwise import initialize_layer

METHODS = {
    "low": Method(Initializer(NF4(), Optimal()), LoraScaling(2)),
    "high": Method(Initializer(NF4(), Optimal()), LoraScaling(6, rank_pattern={"b": 4})),
    "svd": Method(Initializer(NF4(), SVD(), weighting=DiagonalWeighting()), LoraScaling(3)),
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


def initialized(layers, statistics, methods, seed=0):
    """What the methods make of all layers, by method, then by layer."""
    results = {name: {} for name in methods}
    inputs = {name: LayerInputs(layers[name], one, one.tokens) for name, one in statistics.items()}
    for one in Block(0, inputs).drain():
        for name, result in initialize_layer(one.layer, one.statistics, methods, seed):
            results[name][one.layer.name] = result
    return results


def test_methods_together_equal_each_alone(layers, statistics):
    together = initialized(layers, statistics, METHODS, seed=3)
    for name, method in METHODS.items():
        alone = initialized(layers, statistics, {name: method}, seed=3)[name]
        assert list(together[name]) == ["a", "b", "c"]
        for layer, expected in alone.items():
            found = together[name][layer]
            assert found.low_rank.rank == method.scaling.rank_of(layer)
            torch.testing.assert_close(found.low_rank.dense(), expected.low_rank.dense(), rtol=1e-4, atol=1e-6)
            if name == "zero":
                torch.testing.assert_close(found.low_rank.lora_A, expected.low_rank.lora_A, rtol=0, atol=0)
            assert found.error == pytest.approx(expected.error, rel=1e-5)
            assert found.error_optimal == pytest.approx(expected.error_optimal, rel=1e-5)


def test_a_layer_is_quantized_once_for_all_methods_and_its_work_is_freed(layers, statistics, monkeypatch):
    calls = []
    original = NF4.encode
    monkeypatch.setattr(NF4, "encode", lambda self, *arguments: calls.append(1) or original(self, *arguments))
    initialized(layers, statistics, METHODS)
    assert len(calls) == len(layers)
    assert all(inputs.cached("gram", lambda: "freed") == "freed" for inputs in statistics.values())


def test_the_layer_that_fails_is_named(layers, statistics):
    with torch.no_grad():
        layers["b"].module.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="Layer b: Expected finite weights"):
        initialized(layers, statistics, METHODS)
