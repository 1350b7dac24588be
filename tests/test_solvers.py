"""Solvers against independent oracles: the paper's own equations, SciPy, torch's SVD, planted corrections."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import CALIBRATED, SOLVERS, each_solver
from hypothesis import given
from hypothesis import strategies as st

from quailora import (
    NF4,
    SVD,
    AlternatingLeastSquares,
    Diagonal,
    Gram,
    Identity,
    Initializer,
    InputStatistics,
    Optimal,
    Zero,
)
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError, NumericalError
from quailora.methods.recipes import RECIPES
from quailora.testing import make_problem, optimal_error, rounding


def paper_iterates(error, moment, rank, iterations):
    """Equations 5 and 6 as printed, with their normal equations, in float64."""
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    A, B = u[:, :rank] * s[:rank].sqrt(), vh[:rank].T * s[:rank].sqrt()
    for _ in range(iterations):
        A = error @ moment @ B @ torch.linalg.inv(B.T @ moment @ B)
        B = (torch.linalg.inv(A.T @ A) @ A.T @ error).T
    return A @ B.T


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_als_gives_the_iterates_of_the_paper(iterations, shape):
    """The last one is the result, and the history has the error of each."""
    problem = make_problem(*shape, "decaying")
    error, moment = problem.weight.double(), problem.statistics.second_moment
    solution = AlternatingLeastSquares(iterations=iterations).solve(error, Gram(moment), 4)
    iterates = [paper_iterates(error, moment, 4, rounds) for rounds in range(iterations + 1)]
    torch.testing.assert_close(solution.dense(), iterates[-1], rtol=1e-6, atol=1e-9)
    assert solution.iterations == iterations
    errors = [((error - iterate) @ moment * (error - iterate)).sum().item() for iterate in iterates]
    assert solution.history == pytest.approx(errors, rel=1e-9)
    assert errors[0] > 1.01 * errors[1]


def test_the_row_nncf_gives_the_iterates_of_its_source(generator):
    """Three rounds of least squares on the error and on the error of the output for mean inputs, by NumPy's solver."""
    inputs = torch.randn(6, 50, 24, generator=generator) + torch.randn(24, generator=generator)
    statistics = InputStatistics.from_inputs(inputs)
    weight, row = torch.randn(16, 24, generator=generator), RECIPES["nncf"]
    layer = Initializer(NF4(), row.solver, 3, row.weighting)(weight, statistics)
    error, means = (weight - layer.quantized.dequantize()).double().numpy().T, inputs.double().mean(1).numpy()
    both = np.concatenate([np.eye(24), means])
    left = np.linalg.svd(error, full_matrices=False)[0][:, :3]
    for _ in range(3):
        right = np.linalg.lstsq(both @ left, both @ error)[0]
        left = np.linalg.lstsq(both, both @ error @ np.linalg.pinv(right))[0]
    torch.testing.assert_close(
        layer.correction.dense().double(), torch.from_numpy((left @ right).T), rtol=1e-4, atol=1e-5
    )


def test_als_is_stable_in_float32_where_the_normal_equations_are_not():
    """One channel 3000 times larger, float32: within 1 % of the optimum, and of the float64 result."""
    problem = make_problem(64, 96, "massive channel")
    moment = problem.statistics.second_moment
    optimum = optimal_error(problem.weight, moment, 8)
    single = AlternatingLeastSquares().solve(problem.weight, Gram(moment), 8).error
    double = AlternatingLeastSquares().solve(problem.weight.double(), Gram(moment), 8).error
    naive = paper_iterates(problem.weight, moment.float(), 8, 20)
    assert double <= 1.02 * optimum
    assert single <= 1.01 * double
    assert Gram(moment).energy(problem.weight - naive) > 2 * single


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["decaying", "massive channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_als_returns_its_best_round(damping, kind, dtype):
    """Law 4: never a worse iterate than an earlier one, and the history is that of the iterates."""
    problem = make_problem(40, 60, kind, seed=2)
    error, metric = problem.weight.to(dtype), Gram(problem.statistics.second_moment)
    solutions = [AlternatingLeastSquares(rounds, damping).solve(error, metric, 6) for rounds in range(13)]
    history = solutions[-1].history
    total = metric.energy(error)
    assert len(history) == 13
    for rounds, solution in enumerate(solutions):
        assert len(solution.history) == rounds + 1
        assert solution.error == pytest.approx(min(history[: rounds + 1]), abs=8 * torch.finfo(dtype).eps * total)
        least = min(earlier.error for earlier in solutions[: rounds + 1])
        assert solution.error <= least + rounding(least, total, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_als_chooses_an_earlier_round_where_it_is_better(dtype):
    """With damping the error can rise again; then neither the last round nor the start is returned."""
    problem = make_problem(40, 60, "massive channel", seed=2)
    metric = Gram(problem.statistics.second_moment)
    solution = AlternatingLeastSquares(12, 0.01).solve(problem.weight.to(dtype), metric, 6)
    history = solution.history
    assert 0 < history.index(min(history)) < 12
    assert history[-1] > 1.001 * min(history)
    assert solution.error == pytest.approx(min(history), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (20, 20)])
@pytest.mark.parametrize("kind", ["generic", "decaying", "rank-deficient", "massive channel"])
def test_optimal_reaches_the_eckart_young_bound(shape, kind):
    problem = make_problem(*shape, kind)
    moment = problem.statistics.second_moment
    for rank in (1, 5, 12):
        bound = optimal_error(problem.weight, moment, rank)
        solution = Optimal().solve(problem.weight.double(), Gram(moment), rank)
        assert solution.error == pytest.approx(bound, rel=1e-6, abs=1e-9 * Gram(moment).energy(problem.weight))


def test_optimal_energies_are_what_the_correction_gains():
    problem = make_problem(40, 60, "decaying")
    objective = Objective(problem.weight.double(), Gram(problem.statistics.second_moment))
    solution = Optimal().minimise(objective, 9)
    assert solution.energies.sum().item() == pytest.approx(objective.value_at_zero - solution.error)
    root = scipy.linalg.sqrtm(problem.statistics.second_moment.numpy()).real
    expected = scipy.linalg.svdvals(problem.weight.double().numpy() @ root)[:9] ** 2
    torch.testing.assert_close(solution.energies, torch.from_numpy(expected))


def test_the_error_without_correction_is_computed_when_it_is_read_and_once(monkeypatch):
    """It is more work than the solution: solvers and ranks of one objective share it, and nobody pays unasked."""
    problem = make_problem(40, 60, "decaying")
    calls = []
    energy = Gram.energy

    def counting(self, matrix):
        calls.append(matrix.shape)
        return energy(self, matrix)

    monkeypatch.setattr(Gram, "energy", counting)
    objective = Objective(problem.weight, Gram(problem.statistics.second_moment))
    solutions = [solver.minimise(objective, rank) for solver in SOLVERS for rank in (1, 5)]
    assert all(solution.gain >= 0 for solution in solutions)
    assert not calls
    stored = copy.deepcopy(solutions[-1])
    for solution in solutions:
        assert solution.error == pytest.approx(objective.value(solution.lora_B, solution.lora_A))
        assert solution.bound <= solution.error
    assert len(calls) == 1
    assert stored.error == solutions[-1].error


def test_lora_b_is_the_least_squares_solution_for_its_lora_a():
    """Given the optimal right factor, SciPy's regression of the layer's output error on it returns the left one."""
    problem = make_problem(20, 30)
    solution = Optimal().solve(problem.weight.double(), Gram(problem.statistics.second_moment), 4)
    inputs = problem.inputs.double()
    features, outputs = inputs @ solution.lora_A.T, inputs @ problem.weight.double().T
    fitted = scipy.linalg.lstsq(features.numpy(), outputs.numpy())[0]
    torch.testing.assert_close(solution.lora_B, torch.from_numpy(fitted).T.contiguous(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_svd_equals_torch(shape):
    error = make_problem(*shape).weight.double()
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    solution = SVD().solve(error, Identity(), 7)
    torch.testing.assert_close(solution.dense(), u[:, :7] * s[:7] @ vh[:7])
    assert solution.error == pytest.approx((s[7:] ** 2).sum().item())


def test_diagonal_metric_equals_a_scaled_svd():
    """QERA-approx: the SVD of `E S` with `S = diag(sqrt(E[x^2]))`, taken back."""
    problem = make_problem(30, 40, "massive channel")
    power = problem.statistics.second_moment.diagonal()
    error, scale = problem.weight.double(), power.sqrt()
    u, s, vh = torch.linalg.svd(error * scale, full_matrices=False)
    solution = Optimal().solve(error, Diagonal(power), 5)
    torch.testing.assert_close(solution.dense(), (u[:, :5] * s[:5] @ vh[:5]) / scale, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("solver", [SVD(), *CALIBRATED], ids=repr)
def test_planted_correction_is_found(solver, generator):
    """An error of rank 3 is removed by rank 3, whatever the metric."""
    left, right = torch.randn(30, 3, generator=generator), torch.randn(3, 40, generator=generator)
    error = (left @ right).double()
    metric = Gram(make_problem(30, 40, "decaying").statistics.second_moment)
    assert solver.solve(error, metric, 3).error <= 1e-10 * metric.energy(error)


def test_zero_is_the_start_of_plain_lora():
    solution = Zero().solve(make_problem(30, 40).weight, Identity(), 8)
    torch.testing.assert_close(solution.lora_B, torch.zeros(30, 8))
    assert solution.lora_A.abs().max() <= 1 / math.sqrt(40)
    assert solution.lora_A.abs().mean().item() == pytest.approx(0.5 / math.sqrt(40), rel=0.1)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_are_at_least_float32_and_balanced(solver, dtype):
    problem = make_problem(30, 40)
    solution = solver.solve(problem.weight.to(dtype), Gram(problem.statistics.second_moment), 5)
    assert solution.lora_A.dtype == solution.lora_B.dtype == torch.promote_types(dtype, torch.float32)
    if not isinstance(solver, Zero):
        torch.testing.assert_close(solution.lora_A.norm(dim=1), solution.lora_B.norm(dim=0))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_spent_directions_stay_trainable(solver):
    """A rank beyond that of the error leaves directions of plain LoRA, not zeros in both factors."""
    error = torch.zeros(10, 12)
    error[0, 0] = 1
    solution = solver.solve(error, Gram(make_problem(10, 12).statistics.second_moment), 4)
    assert (solution.lora_A.norm(dim=1) > 0.1).all()
    assert (solution.lora_B.norm(dim=0) > 0).sum() <= 1


@given(seed=st.integers(0, 99), rank=st.integers(1, 10))
def test_objective_value_equals_the_dense_computation(seed, rank):
    problem = make_problem(12, 15, "massive channel", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lora_B, lora_A = torch.randn(12, rank, generator=generator), torch.randn(rank, 15, generator=generator)
    metric = Gram(problem.statistics.second_moment)
    dense = metric.energy(problem.weight.double() - lora_B.double() @ lora_A.double())
    assert Objective(problem.weight, metric).value(lora_B, lora_A) == pytest.approx(dense)


def test_damping_adds_to_the_diagonal():
    moment = make_problem(4, 6).statistics.second_moment
    damped = Gram(moment).damped(0.5).product(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(damped, moment + 0.5 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64))
    powers = Diagonal(moment.diagonal()).damped(0.5).product(torch.ones(1, 6, dtype=torch.float64))
    torch.testing.assert_close(powers[0], moment.diagonal() + 0.5 * moment.diagonal().mean())


def test_bad_hyper_parameters_are_refused():
    with pytest.raises(ConfigurationError, match=r"damping of at least 0, got -0\.1"):
        Optimal(damping=-0.1)
    with pytest.raises(ConfigurationError, match="iterations of at least 0, got -1"):
        AlternatingLeastSquares(iterations=-1)


@each_solver
def test_bad_arguments_are_refused(solver):
    error = make_problem(6, 8).weight
    with pytest.raises(ValueError, match=r"Expected a rank from 1 to 6 .* got 7"):
        solver.solve(error, Identity(), 7)
    with pytest.raises(ValueError, match="Expected a rank from 1 to 6"):
        solver.solve(error, Identity(), 0)
    with pytest.raises(ValueError, match="Expected a matrix"):
        solver.solve(error[0], Identity(), 1)
    error[0, 0] = math.nan
    with pytest.raises(NumericalError, match="finite error matrix"):
        solver.solve(error, Identity(), 2)


def test_solvers_run_on_a_real_quantization_error():
    """The order of the four errors, with room between them, for correlated inputs."""
    problem = make_problem(96, 128, "decaying")
    error = problem.weight - NF4().quantize(problem.weight).dequantize()
    metric = Gram(InputStatistics.from_inputs(problem.inputs).second_moment)
    none, svd, als, best = (
        solver.solve(error, metric, 16).error for solver in (Zero(), SVD(), AlternatingLeastSquares(), Optimal())
    )
    assert best <= als <= 1.005 * best
    assert als < 0.5 * svd
    assert svd < none
