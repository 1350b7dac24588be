"""Seconds of what happens before a solver runs: quantization and statistics."""

from __future__ import annotations

import pytest
import torch
from oracles import load_auto_gptq, run_auto_gptq
from problems import realistic_second_moment, statistics_of

from quailora import GPTQ, NF4, Gram, InputStatistics, Int8, Uniform

SHAPES = [(576, 1536), (2048, 2048), (4096, 4096)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def layer(request):
    weight = 0.02 * torch.randn(request.param, generator=torch.Generator().manual_seed(0))
    return weight, statistics_of(realistic_second_moment(request.param[1]))


def relative_error(weight, statistics, restored):
    metric = Gram(statistics.second_moment)
    return metric.energy(weight - restored) / metric.energy(weight)


@pytest.mark.parametrize("quantizer", [NF4(), Int8(), Uniform()], ids=lambda q: type(q).__name__)
def test_quantizer(benchmark, record, layer, quantizer):
    quantized = benchmark.pedantic(quantizer.quantize, layer, rounds=3, warmup_rounds=1)
    error = relative_error(*layer, quantized.dequantize())
    record(shape=tuple(layer[0].shape), relative_error=error, bits_per_weight=quantized.bits_per_weight)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_gptq(benchmark, record, layer, shared):
    """Alone it also factors the Gram; the second and third layer with the same input do not."""
    weight, statistics = layer
    quantizer = GPTQ(bits=4, group_size=128, damping_scale="mean", shrinkage=0.0)

    def prepare():
        if not shared:
            statistics.clear_cache()
        return layer, {}

    quantized = benchmark.pedantic(quantizer.quantize, setup=prepare, rounds=3, warmup_rounds=1)
    record(shape=tuple(weight.shape), relative_error=relative_error(weight, statistics, quantized.dequantize()))


def test_auto_gptq(benchmark, record, layer, monkeypatch):
    """AutoGPTQ's class on the same Gram and grid: the baseline of GPTQ."""
    oracle = load_auto_gptq()
    if oracle is None:
        pytest.skip("the wheel of auto-gptq is not installed")
    weight, statistics = layer
    quantizer = GPTQ(bits=4, group_size=128, damping_scale="mean", shrinkage=0.0)
    arguments = (oracle, weight, statistics.second_moment.float(), quantizer, monkeypatch)
    restored = benchmark.pedantic(run_auto_gptq, arguments, rounds=3, warmup_rounds=1)
    record(shape=tuple(weight.shape), relative_error=relative_error(weight, statistics, restored))


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
@pytest.mark.parametrize("width", [576, 2048, 4096])
def test_statistics(benchmark, record, width, tokens):
    inputs = torch.randn(tokens, width)
    statistics = InputStatistics(width)
    benchmark.pedantic(statistics.update, (inputs,), rounds=2, warmup_rounds=1)
    record(width=width, tokens=tokens, work=tokens * width * (width + 1))
