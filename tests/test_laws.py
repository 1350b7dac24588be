"""The laws of design, over random shapes, scales, dtypes and degenerate inputs, for every quantizer and solver."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import CALIBRATED, QUANTIZERS, SOLVERS, each_quantizer, each_quantizer_row, each_solver
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems

from quailora import SVD, Gram, Initializer, InputStatistics, Optimal, Uniform
from quailora.core.weightings import WEIGHTINGS, FisherWeighting, Sensitivity
from quailora.testing import check_quantizer, check_solver, indefiniteness, make_problem, optimal_error, rounding


@each_quantizer_row
@given(problem=problems())
def test_quantizer_laws(quantizer, idempotent, problem):
    """Law 1: shape, dtype, stored bytes, idempotence."""
    check_quantizer(quantizer, problem, idempotent=idempotent)


@each_solver
@pytest.mark.parametrize("weighting", [cls() for cls in WEIGHTINGS.values()], ids=list(WEIGHTINGS))
@settings(max_examples=15)
@given(problem=problems())
def test_solver_laws(solver, weighting, problem):
    """Laws 2 and 3 on an arbitrary error matrix, in every metric that solvers see."""
    check_solver(solver, problem, weighting=weighting)


@each_solver
@settings(max_examples=25)
@given(problem=problems(), data=st.data())
def test_solver_laws_where_outputs_count_too(solver, problem, data):
    """Laws 2 and 3 for `sum_ij rows_i (E - C)_ij^2 columns_j`, the error that row and column weights define."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (1e-3 + torch.rand(side, generator=generator).double() ** 3 for side in problem.weight.shape)
    full = min(problem.weight.shape)
    rank = data.draw(st.integers(1, full))
    dtype = torch.promote_types(problem.weight.dtype, torch.float32)
    base = Uniform(bits=3, group_size=None)
    error = (problem.weight.to(dtype) - base.quantize(problem.weight).dequantize().to(dtype)).double()
    scaled, moment = rows.sqrt()[:, None] * error, columns.diag()

    def solve(solver, rank):
        initializer = Initializer(base, solver, rank, FisherWeighting())
        return initializer(problem.weight, problem.statistics, Sensitivity(rows, columns)).low_rank

    def weighted(matrix):
        return (rows @ matrix.square() @ columns).item()

    solution, total = solve(solver, rank), weighted(error)
    left = weighted(error - solution.dense().double())
    optimum, floor = optimal_error(scaled, moment, rank), 1e-9 * total
    slack = rounding(left, total, dtype, 64) + 1e-6 * left + floor
    assert abs(solution.error - left) <= slack
    assert optimum - slack <= left <= total + slack
    assert left <= solve(solver, max(1, rank - 1)).error + slack
    if solver.needs_calibration:
        assert left <= solve(SVD(), rank).error + slack
    if isinstance(solver, Optimal) and not solver.damping:
        assert left <= optimum + slack


@each_quantizer
@settings(max_examples=18)
@given(problem=problems(), solver=st.sampled_from(SOLVERS))
def test_solver_laws_on_quantization_errors(quantizer, solver, problem):
    """Laws 2 and 3 on the error of every quantizer."""
    check_solver(solver, problem, quantizer)


@pytest.mark.parametrize("solver", CALIBRATED, ids=repr)
@given(problem=problems(), quantizer=st.sampled_from([row[0] for row in QUANTIZERS]), data=st.data())
def test_calibrated_error_never_exceeds_uncalibrated_error(solver, problem, quantizer, data):
    """Law 2, through the front door: optimum <= calibrated <= uncalibrated <= no correction."""
    rank = data.draw(st.integers(1, min(problem.weight.shape)))
    layer = Initializer(quantizer, solver, rank)(problem.weight, problem.statistics)
    working = torch.promote_types(problem.weight.dtype, torch.float32)
    slack = 2 * rounding(layer.error_uncalibrated, layer.error_none, working) + 1e-9 * layer.error_none
    assert layer.error_optimal <= layer.error + slack
    assert layer.error <= layer.error_uncalibrated + slack
    assert layer.error_uncalibrated <= layer.error_none + slack
    error = problem.weight.to(working) - layer.quantized.dequantize().to(working)
    moment = problem.statistics.second_moment
    bound = optimal_error(error, moment, rank)
    assert abs(layer.error_optimal - bound) <= slack + 1e-6 * bound + indefiniteness(error, moment)


@given(
    problem=problems(dtypes=(torch.float32,)), cuts=st.lists(st.integers(0, 100), max_size=4), seed=st.integers(0, 99)
)
def test_statistics_merge_in_any_order(problem, cuts, seed):
    """Law 6: parts merged in any order equal everything at once."""
    inputs = problem.inputs
    bounds = sorted({0, len(inputs), *(cut for cut in cuts if cut < len(inputs))})
    parts = [InputStatistics.from_inputs(inputs[a:b]) for a, b in pairwise(bounds)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
    merged = parts[order[0]]
    for index in order[1:]:
        merged = merged.merge(parts[index])
    whole = InputStatistics.from_inputs(inputs)
    assert merged.tokens == whole.tokens
    scale = whole.second_moment.diagonal().max().item()
    torch.testing.assert_close(merged.second_moment, whole.second_moment, rtol=1e-5, atol=1e-6 * scale)


@given(problem=problems(dtypes=(torch.float32,)), seed=st.integers(0, 99))
def test_padding_counts_nothing(problem, seed):
    """Law 6: masked tokens count nothing, whatever they hold."""
    inputs = problem.inputs
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(inputs), generator=generator) < 0.5
    mask[0] = True
    padded = torch.where(mask[:, None], inputs, torch.nan)
    masked = InputStatistics(inputs.shape[1])
    masked.update(padded[None], mask[None])
    real = InputStatistics.from_inputs(inputs[mask])
    assert masked.tokens == int(mask.sum())
    torch.testing.assert_close(masked.second_moment, real.second_moment)


def test_uncalibrated_svd_is_optimal_without_calibration():
    """In the identity metric, SVD and Optimal are one solver."""
    problem = make_problem(30, 50)
    svd, optimal = (Initializer(QUANTIZERS[5][0], SVD(), 5)(problem.weight), Optimal())
    identity = Gram(torch.eye(50, dtype=torch.float64))
    error = problem.weight - svd.quantized.dequantize()
    assert svd.error == pytest.approx(optimal.solve(error, identity, 5).error)
