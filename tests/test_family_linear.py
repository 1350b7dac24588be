"""The solver of families that are linear in their parameters."""

from __future__ import annotations

import pytest
import torch

from quailora import Diagonal, Gram, Identity
from quailora.core.linalg import semidefinite_solve
from quailora.core.metrics import Damped, shrunk
from quailora.core.objective import Objective
from quailora.errors import NumericalError
from quailora.families import linear
from quailora.families.linear import block_inverse, dense_metric, least_squares
from quailora.testing import make_problem

PROBLEM = make_problem(6, 12, "decaying")
MOMENT = PROBLEM.statistics.second_moment


@pytest.mark.parametrize(
    "metric",
    [Identity(), Diagonal(MOMENT.diagonal()), Gram(MOMENT), shrunk(PROBLEM.statistics), Damped(Gram(MOMENT), 2.0)],
)
def test_a_dense_metric_has_the_same_products(metric):
    matrix = PROBLEM.weight.double()
    torch.testing.assert_close(matrix @ dense_metric(metric, matrix), metric.product(matrix))


def test_conjugate_gradients_find_any_correction(generator):
    """With a change that is a dense matrix times the parameters, of any shape, and no preconditioner."""
    matrix, _ = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))
    objective = Objective(PROBLEM.weight, Gram(MOMENT))
    found = least_squares(objective, lambda part: matrix @ part, lambda change: matrix.T @ change)
    error, least = (objective.error - matrix @ part for part in (found, matrix.T @ objective.error.double()))
    assert found.shape == (2, 12)
    assert objective.metric.energy(error) <= 1.01 * objective.metric.energy(least)


def test_the_exact_inverse_takes_one_round():
    calls = []

    def apply(part):
        calls.append(part)
        return part

    objective = Objective(PROBLEM.weight, Gram(MOMENT))
    inverse = torch.linalg.inv(MOMENT)
    found = least_squares(objective, apply, lambda change: change, lambda residual: residual @ inverse)
    torch.testing.assert_close(found, PROBLEM.weight.double(), rtol=1e-4, atol=1e-6)
    assert len(calls) == 1


def test_no_error_takes_no_round():
    objective = Objective(torch.zeros(6, 12), Gram(MOMENT))
    assert not least_squares(objective, lambda part: part, lambda change: change).any()


@pytest.mark.parametrize("width", [2, 3, 100])
def test_groups_are_solved_for_together(width, monkeypatch, generator):
    """Exactly where no group is wider than a block; each part of a wider one by itself."""
    monkeypatch.setattr(linear, "_WIDTH", width)
    groups = torch.tensor([4, 0, 4, 7, 0, 4])
    roots = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = roots @ roots.T
    kept = groups[:, None] == groups
    if width == 2:  # the first and the third parameter of group 4 are one part, and the second is another
        kept[2] = kept[:, 2] = torch.arange(6) == 2
    inverse = block_inverse(groups, lambda table: matrix[table[:, :, None], table[:, None]])
    right = torch.arange(1.0, 7.0, dtype=torch.float64)
    torch.testing.assert_close(inverse(right), torch.linalg.solve(matrix * kept, right))


def test_singular_systems_are_solved(generator):
    """With a dead unknown, one that is there twice, and one that is far louder than the others."""
    roots = torch.randn(2, 5, 9, generator=generator, dtype=torch.complex128)
    roots[:, 0], roots[:, 2], roots[:, 3] = 0, roots[:, 1], 1e5 * roots[:, 3]
    matrices = roots @ roots.mH
    right = matrices @ torch.randn(2, 5, 3, generator=generator, dtype=torch.complex128)
    found = semidefinite_solve(matrices, right)
    torch.testing.assert_close(matrices @ found, right, rtol=1e-8, atol=1e-8)
    assert not found[:, 0].any()


def test_indefinite_systems_are_refused():
    with pytest.raises(NumericalError, match="Expected normal equations that are positive semidefinite"):
        semidefinite_solve(
            torch.tensor([[[1.0, 3], [3, 1]]], dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
        )
