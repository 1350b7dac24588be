"""Seconds of each solver at the sizes of real layers, beside those of other routes, and the error reached.

`test_whole_call` times what a user calls, `Optimal().solve(error, metric, rank)`, on a metric that is not used yet,
without and with reading the error. In the others each problem is prepared first: the quantization error, its Gram with
its copy in float32, and the error without correction. What is timed is the way from there to factors with their gain.
"""

from __future__ import annotations

import pytest
import torch
from problems import RANKS, SHAPES, exact_route, full_svd, products, quantization_error, realistic_second_moment

from quailora import SVD, AlternatingLeastSquares, Gram, Optimal
from quailora.core.metrics import Identity
from quailora.core.objective import Deferred, Objective

EXACT_ROUTE_UP_TO = 4096  # the eigendecomposition of a Gram of width 14336 takes many minutes


class Problem:
    """One error in two metrics, with the optimum of each where a baseline has found it."""

    def __init__(self, shape):
        self.shape = shape
        self.error = quantization_error(shape)
        self.metrics = {"gram": Gram(realistic_second_moment(shape[1])), "identity": Identity()}
        self.totals = {name: metric.energy(self.error) for name, metric in self.metrics.items()}
        self.spectra = {}

    def fresh(self, metric):
        """Return the objective as it is before any solver has seen it."""
        objective = Objective(self.error, self.metrics[metric])
        objective.__dict__["total"] = Deferred.known(self.totals[metric])  # a cached property, filled beforehand
        return objective

    def captured(self, metric, rank, error, bound=None):
        """Return the share of the attainable error reduction that a correction reaches."""
        if metric in self.spectra:
            gain = self.spectra[metric][:rank].double().square().sum().item()
        elif bound is not None:
            gain = self.totals[metric] - bound
        else:
            return None
        return (self.totals[metric] - error) / gain


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def problem(request):
    return Problem(request.param)


def test_matmul(benchmark, record, problem):
    """The rate that floors are computed from: float32, square, as wide as the layer's shorter side."""
    side = min(problem.shape)
    matrix = torch.randn(side, side)
    benchmark.pedantic(torch.mm, (matrix, matrix), rounds=3, warmup_rounds=1)
    record(shape=problem.shape, work=2 * side**3)


def test_value_at_zero(benchmark, record, problem):
    """Measuring the error without correction, in the Gram."""
    benchmark.pedantic(problem.metrics["gram"].energy, (problem.error,), rounds=2, warmup_rounds=1)
    record(shape=problem.shape)


def test_full_svd(benchmark, record, problem):
    rounds = 3 if max(problem.shape) < 4096 else 1
    u_s, vh, singular = benchmark.pedantic(
        full_svd, (problem.error, RANKS[-1]), rounds=rounds, warmup_rounds=rounds // 3
    )
    problem.spectra["identity"] = singular
    record(shape=problem.shape)
    assert torch.dist(u_s @ vh, problem.error) < problem.error.norm()


def test_exact_route(benchmark, record, problem):
    if max(problem.shape) > EXACT_ROUTE_UP_TO:
        pytest.skip("the eigendecomposition alone takes many minutes")
    rounds = 3 if max(problem.shape) < 4096 else 1
    arguments = (problem.error, problem.metrics["gram"].second_moment, 64)
    lora_B, lora_A, singular = benchmark.pedantic(exact_route, arguments, rounds=rounds, warmup_rounds=rounds // 3)
    problem.spectra["gram"] = singular
    error = problem.fresh("gram").value(lora_B, lora_A)
    record(shape=problem.shape, captured=problem.captured("gram", 64, error))


@pytest.mark.parametrize("reading", [False, True], ids=["solve", "solve-and-read-the-error"])
def test_whole_call(benchmark, record, problem, reading):
    """The whole call at rank 64, from the error and its Gram in float64 to factors, or to factors and their error."""

    def call(metric):
        solution = Optimal().solve(problem.error, metric, 64)
        return solution.error if reading else solution

    benchmark.pedantic(
        call, setup=lambda: ((Gram(problem.metrics["gram"].second_moment),), {}), rounds=3, warmup_rounds=1
    )
    record(shape=problem.shape, reading=reading)


@pytest.mark.parametrize("rank", RANKS)
def test_svd_lowrank(benchmark, record, problem, rank):
    """PyTorch's own randomised SVD with its defaults, which are two rounds and no oversampling."""
    u, s, v = benchmark.pedantic(torch.svd_lowrank, (problem.error, rank), rounds=3, warmup_rounds=1)
    error = problem.fresh("identity").value(u * s, v.T)
    record(shape=problem.shape, rank=rank, captured=problem.captured("identity", rank, error))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("metric", ["gram", "identity"])
@pytest.mark.parametrize("solver", [Optimal(), SVD(), AlternatingLeastSquares()], ids=lambda s: type(s).__name__)
def test_solver(benchmark, record, problem, solver, metric, rank):
    if isinstance(solver, SVD) != (metric == "identity"):
        pytest.skip("each solver in its own metric")
    large = max(problem.shape) >= 4096
    solved = benchmark.pedantic(
        solver.minimise,
        setup=lambda: ((problem.fresh(metric), rank), {}),
        rounds=1 if large and isinstance(solver, AlternatingLeastSquares) else 3,
        warmup_rounds=0 if large else 1,
    )
    objective = problem.fresh(metric)
    columns = objective.subspace(rank).applications
    bound = objective.bound(rank)
    record(
        shape=problem.shape,
        rank=rank,
        metric=metric,
        captured=problem.captured(metric, rank, solved.error, bound),
        certified=(problem.totals[metric] - solved.error) / (problem.totals[metric] - bound),
        columns=columns,
        work=products(problem.shape, columns, rank) if columns else None,
    )
