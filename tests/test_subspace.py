"""The Krylov search against dense eigenvalues: what it captures, what it certifies, when it gives up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quailora import NF4, AlternatingLeastSquares, Gram, Optimal
from quailora.core import objective as objective_module
from quailora.core.metrics import Diagonal, Identity, Metric
from quailora.core.objective import Objective
from quailora.core.subspace import KrylovSearch, worth_iterating
from quailora.errors import ConfigurationError
from quailora.testing import make_problem, optimal_error

KINDS = ["generic", "decaying", "rank-deficient", "massive channel"]


@pytest.fixture(autouse=True)
def always_iterate(monkeypatch):
    """Also at sizes where a dense eigenproblem would be chosen."""
    monkeypatch.setattr(objective_module, "worth_iterating", lambda *_, **__: True)


def quantization_error(out_features: int, in_features: int, kind: str, seed: int = 0):
    problem = make_problem(out_features, in_features, kind, seed=seed)
    error = problem.weight - NF4().quantize(problem.weight).dequantize()
    return error, Gram(problem.statistics.second_moment)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(400, 500), (500, 400)])
@pytest.mark.parametrize("rank", [4, 24])
def test_within_tolerance_of_the_optimum_and_certified(kind, shape, rank):
    """In float32: error at most a thousandth above the optimum, and the certificate is neither broken nor loose."""
    error, metric = quantization_error(*shape, kind)
    objective = Objective(error, metric)
    found = objective.subspace(rank)
    assert found.applications > 0
    assert found.basis.dtype == torch.float32
    optimum = optimal_error(error, metric.second_moment, rank)
    achieved = Optimal().minimise(objective, rank)
    measured = metric.energy(error.double() - achieved.lora_B.double() @ achieved.lora_A.double())
    assert achieved.error == pytest.approx(measured, rel=1e-5)
    assert measured <= 1.001 * optimum
    assert objective.value_at_zero - measured >= 0.999 * (objective.value_at_zero - optimum)
    assert achieved.bound <= optimum * (1 + 1e-5)
    assert achieved.bound >= 0.997 * optimum


@pytest.mark.parametrize("metric", [Identity(), Diagonal(torch.rand(640, generator=torch.Generator().manual_seed(0)))])
@pytest.mark.parametrize("seed", range(3))
def test_flat_spectra_are_found_too(metric: Metric, seed):
    """The spectrum of a quantization error itself hardly decays: at least 99.9 % of the attainable gain."""
    weight = torch.randn(640, 640, generator=torch.Generator().manual_seed(seed))
    error = weight - NF4().quantize(weight).dequantize()
    assert worth_iterating(640, 16, decaying=False)
    objective = Objective(error, metric)
    found = objective.subspace(16)
    values = torch.linalg.svdvals(metric.rooted(error.double()))[:16] ** 2
    assert found.applications > 0
    assert found.energies.sum() >= 0.999 * values.sum()
    assert (found.upper >= values * (1 - 1e-5)).all()


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_searches_that_are_begun_succeed(rank, flat, seed):
    """At the smallest side of layers that is searched: one that gives up has cost its time for nothing."""
    side = next(side for side in range(64, 2000, 64) if worth_iterating(side, rank, decaying=not flat))
    error, gram = quantization_error(side, side, "generic", seed)
    assert Objective(error, Identity() if flat else gram).subspace(rank).applications > 0


@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("metric", ["gram", "identity"])
def test_convergence_is_checked_a_few_times_only(metric, rank, monkeypatch):
    """Each check is a small eigenproblem: most of the time of a search on an accelerator."""
    error, gram = quantization_error(1024, 1024, "decaying")
    checks = []
    ritz = KrylovSearch._ritz
    monkeypatch.setattr(KrylovSearch, "_ritz", lambda self, rank: checks.append(rank) or ritz(self, rank))
    found = Objective(error, gram if metric == "gram" else Identity()).subspace(rank)
    assert found.applications > 0
    assert len(checks) <= 5
    assert found.applications <= (2 * rank + 128 if metric == "gram" else 3 * rank + 416)


@given(seed=st.integers(0, 99), kind=st.sampled_from(KINDS), rank=st.integers(1, 12))
@settings(max_examples=25)
def test_energies_and_bounds_enclose_the_eigenvalues(seed, kind, rank):
    error, metric = quantization_error(220, 240, kind, seed)
    found = Objective(error.double(), metric).subspace(rank)
    values = torch.linalg.eigvalsh(error.double() @ metric.second_moment @ error.T.double()).flip(0)[:rank]
    slack = 1e-9 * values[0]
    assert (found.energies <= values + slack).all()
    assert (found.upper >= values - slack).all()
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(rank, dtype=torch.float64))


def test_float64_errors_stay_in_float64():
    error, metric = quantization_error(400, 500, "massive channel")
    single = Objective(error, metric).subspace(8)
    double = Objective(error.double(), metric).subspace(8)
    assert double.basis.dtype == torch.float64
    torch.testing.assert_close(single.energies, double.energies, rtol=1e-4, atol=1e-6 * single.energies[0].item())


def test_lower_ranks_are_free_and_higher_ones_go_on():
    error, metric = quantization_error(400, 500, "decaying")
    objective = Objective(error, metric)
    high = objective.subspace(24)
    low = objective.subspace(6)
    torch.testing.assert_close(low.basis, high.basis[:, :6], rtol=0, atol=0)

    higher = objective.subspace(40)
    fresh = Objective(error, metric).subspace(40)
    assert higher.applications == fresh.applications
    torch.testing.assert_close(higher.energies, fresh.energies)


def test_a_tighter_tolerance_searches_on():
    error, metric = quantization_error(400, 400, "generic")
    objective = Objective(error, metric)
    loose = objective.subspace(8, tolerance=0.1)
    tight = objective.subspace(8, tolerance=1e-5)
    assert tight.slack < loose.slack
    assert objective.subspace(8, tolerance=0.1).slack == tight.slack


def test_a_search_that_finds_too_little_falls_back_to_dense():
    """Rank 100 of 220 directions cannot converge within half of them."""
    error, metric = quantization_error(220, 240, "generic")
    found = Objective(error, metric).subspace(100)
    assert found.applications == 0
    assert found.slack == 0


def test_rounding_ends_the_search_where_there_is_nothing_left(generator):
    """A planted error of rank 3, searched for 8 directions: the rest is rounding, and the search says so early."""
    error = torch.randn(300, 3, generator=generator) @ torch.randn(3, 300, generator=generator)
    search = KrylovSearch(lambda at: error @ (error.T @ at), torch.randn(300, 32, generator=generator))
    found = search.find(8, tolerance=1e-3, limit=150)
    assert found is not None
    assert found.energies[3:].sum() <= 1e-5 * found.energies[0]


@pytest.mark.parametrize("entries", [0, 1, 5, 40])
def test_errors_of_few_entries_are_removed(entries, generator):
    """Where products have nothing new in them, the basis stays orthonormal and no energy is counted twice."""
    error = torch.zeros(300, 280)
    error[torch.arange(entries), torch.arange(entries)] = torch.rand(entries, generator=generator) + 0.5
    objective = Objective(error, Gram(make_problem(1, 280, "generic").statistics.second_moment))
    found = objective.subspace(48)
    assert found.applications > 0
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(48), rtol=1e-4, atol=1e-4)
    assert found.energies.sum().item() == pytest.approx(objective.value_at_zero, rel=1e-5)
    solution = Optimal().minimise(objective, 48)
    left = objective.metric.energy(error.double() - solution.dense().double())
    assert left <= 1e-9 * objective.value_at_zero
    assert solution.error == pytest.approx(left, abs=1e-7 * objective.value_at_zero)


@pytest.mark.parametrize("solver", [Optimal(), AlternatingLeastSquares(iterations=300)], ids=repr)
def test_one_massive_channel_in_float32(solver):
    """One channel 3000 times larger: within 0.1 % of the optimum in float64 for every calibrated solver."""
    error, metric = quantization_error(300, 400, "massive channel")
    solution = solver.solve(error, metric, 12)
    measured = metric.energy(error.double() - solution.lora_B.double() @ solution.lora_A.double())
    assert measured <= 1.001 * optimal_error(error, metric.second_moment, 12)


def test_tolerances_must_be_positive():
    with pytest.raises(ConfigurationError, match=r"tolerance above 0, got 0\.0"):
        Optimal(tolerance=0.0)
