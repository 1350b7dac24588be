"""Metrics against dense computations in float64."""

from __future__ import annotations

import pytest
import torch

from quailora import Diagonal, Gram, Identity
from quailora.core.metrics import Damped, Shrunk, shrunk
from quailora.testing import make_problem

WIDTH = 300  # wide enough for energies in float32


def moment(kind="massive channel"):
    return make_problem(1, WIDTH, kind).statistics.second_moment


METRICS = [
    (Identity(), torch.eye(WIDTH, dtype=torch.float64)),
    (Diagonal(moment().diagonal()), moment().diagonal().diag()),
    (Gram(moment()), moment()),
    (
        shrunk(make_problem(1, WIDTH, "massive channel").statistics, 0.3),
        0.7 * moment() + 0.3 * moment().diagonal().diag(),
    ),
    (Damped(Gram(moment()), 0.5), moment() + 0.5 * torch.eye(WIDTH, dtype=torch.float64)),
]
each_metric = pytest.mark.parametrize(("metric", "dense"), METRICS, ids=lambda value: type(value).__name__)


@each_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_keep_the_dtype(metric, dense, dtype, generator):
    matrix = torch.randn(7, WIDTH, generator=generator, dtype=dtype)
    product = metric.product(matrix)
    assert product.dtype == dtype
    expected = matrix.double() @ dense
    assert (product - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * expected.norm()


@each_metric
def test_energies(metric, dense, generator):
    matrix = torch.randn(50, WIDTH, generator=generator)
    expected = (matrix.double() @ dense * matrix.double()).sum().item()
    assert metric.energy(matrix) == pytest.approx(expected, rel=1e-7)
    assert metric.energy(matrix.double()) == pytest.approx(expected, rel=1e-12)
    half = matrix.bfloat16()
    assert metric.energy(half) == pytest.approx(metric.energy(half.double()), rel=1e-7)
    assert metric.mean_power() == pytest.approx(dense.diagonal().mean().item())


def test_a_massive_channel_hides_nothing_in_float32(generator):
    """What 299 quiet channels add up to is right although one holds ten million times as much."""
    metric, matrix = Gram(moment()), torch.randn(50, WIDTH, generator=generator)
    loud = WIDTH // 2
    only_loud = torch.zeros_like(matrix)
    only_loud[:, loud] = matrix[:, loud]
    quiet = metric.energy(matrix) - metric.energy(only_loud)
    exact = metric.energy(matrix.double()) - metric.energy(only_loud.double())
    assert abs(quiet) < 1e-2 * metric.energy(matrix)
    assert quiet == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(("metric", "dense"), METRICS[:2], ids=["Identity", "Diagonal"])
def test_roots_of_diagonal_metrics(metric, dense, generator):
    matrix = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    rooted = metric.rooted(matrix)
    torch.testing.assert_close(rooted @ rooted.T, matrix @ dense @ matrix.T)


def test_metrics_with_correlations_have_no_cheap_root(generator):
    matrix = torch.randn(5, WIDTH, generator=generator)
    roots = {type(metric): metric.rooted(matrix) for metric, _ in METRICS}
    assert {cls for cls, root in roots.items() if root is None} == {Gram, Shrunk, Damped}


def test_no_damping_changes_nothing():
    metric = Gram(moment())
    assert metric.damped(0.0) is metric
