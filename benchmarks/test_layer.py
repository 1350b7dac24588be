"""Seconds of each part of one layer's initialization, with the error it reaches beside them.

`make bench` runs them. Every solver stands beside `torch.linalg.svd` of the same error, measured in the same run.
"""

from __future__ import annotations

import pytest
import torch

from quailora import GPTQ, NF4, SVD, AlternatingLeastSquares, Gram, InputStatistics, Int8, Optimal, Uniform
from quailora.objective import Objective
from quailora.testing import make_problem

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]
RANK = 64


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def problem(request):
    return make_problem(*request.param, "decaying")


@pytest.fixture(scope="module")
def objective(problem):
    error = problem.weight - NF4().quantize(problem.weight).dequantize()
    prepared = Objective(error, Gram(problem.statistics.second_moment))
    assert prepared.value_at_zero > 0  # computes what all solvers share
    return prepared


def record(benchmark, **values):
    benchmark.extra_info.update(values, threads=torch.get_num_threads(), torch=torch.__version__)


def test_full_svd(benchmark, objective):
    """The baseline: one step of LoftQ."""
    u, s, vh = benchmark.pedantic(torch.linalg.svd, (objective.error, False), rounds=3, warmup_rounds=1)
    error = objective.value(u[:, :RANK] * s[:RANK], vh[:RANK])
    record(benchmark, share_of_error_left=error / objective.value_at_zero)


@pytest.mark.parametrize("solver", [SVD(), AlternatingLeastSquares(), Optimal()], ids=lambda s: type(s).__name__)
def test_solver(benchmark, objective, solver):
    solution = benchmark.pedantic(solver.minimise, (objective, RANK), rounds=3, warmup_rounds=1)
    record(benchmark, share_of_error_left=solution.error / objective.value_at_zero)


@pytest.mark.parametrize("quantizer", [NF4(), Int8(), Uniform(), GPTQ()], ids=lambda q: type(q).__name__)
def test_quantizer(benchmark, problem, quantizer):
    quantized = benchmark.pedantic(quantizer.quantize, (problem.weight, problem.statistics), rounds=3, warmup_rounds=1)
    error = Gram(problem.statistics.second_moment).energy(problem.weight - quantized.dequantize())
    energy = Gram(problem.statistics.second_moment).energy(problem.weight)
    record(benchmark, relative_error=error / energy, bits_per_weight=quantized.bits_per_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics(benchmark, problem, dtype):
    inputs = torch.randn(1024, problem.weight.shape[1]).to(dtype)
    statistics = InputStatistics(inputs.shape[1])
    benchmark.pedantic(statistics.update, (inputs,), rounds=5, warmup_rounds=1)
    record(benchmark, tokens=len(inputs))
