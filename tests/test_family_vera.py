"""VeRA: its vectors against a least-squares solve by NumPy, and corrections that were planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError
from quailora.families.vera import Vera
from quailora.testing import make_problem
from quailora.testing.families import objective_of


@pytest.mark.parametrize("end", ["vera_lambda_b", "vera_lambda_d"])
def test_neither_vector_can_be_bettered_alone(end):
    """NumPy's least squares over all entries of one vector, with the other one as it is, gains next to nothing."""
    problem = make_problem(24, 16, "decaying", seed=3)
    objective, base = objective_of(problem)
    fit = Vera().fit(objective, 6)
    found = {name: tensor.double() for name, tensor in fit.correction.parameters.items()}
    root = torch.linalg.cholesky(problem.statistics.second_moment)

    def weighted(vector):
        return Vera().change({**found, end: vector}, base).weight @ root

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(weighted, found[end]).flatten(0, 1)
    target = (objective.error.double() @ root).flatten()
    residual = target.numpy() - jacobian.numpy() @ np.linalg.lstsq(jacobian.numpy(), target.numpy())[0]
    assert (residual**2).sum() <= fit.error * (1 + 1e-6)
    assert fit.error <= 1.002 * (residual**2).sum()
    assert fit.error < 0.8 * Vera().uncalibrated(objective, 6).error


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_correction_is_found(seed):
    """Either vector is known up to a factor: with one of them right, the other one is."""
    base, generator = torch.zeros(40, 30), torch.Generator().manual_seed(seed)
    planted = {end: torch.randn(size, generator=generator) for end, size in Vera().shapes((40, 30), 8).items()}
    error = Vera().change(planted, base).weight
    objective = Objective(error, gram(make_problem(40, 30, "decaying", seed=seed).statistics), base=lambda: base)
    fit = Vera().fit(objective, 8)
    assert fit.error < 1e-10 * objective.value_at_zero
    assert fit.correction.parameters["vera_lambda_d"].square().mean().sqrt() == pytest.approx(0.1)


def test_no_error_leaves_a_start_that_can_be_trained():
    """With two vectors of zeros neither would have a gradient."""
    objective, base = objective_of(make_problem(32, 24))
    fit = Vera().fit(replace(objective, error=torch.zeros(32, 24)), 4)
    parameters = {name: tensor.requires_grad_() for name, tensor in fit.correction.parameters.items()}
    Vera().change(parameters, base).weight.sum().backward()
    assert fit.error == 0
    assert parameters["vera_lambda_b"].grad.all()


def test_the_shape_of_the_layer_has_to_be_known():
    with pytest.raises(ConfigurationError, match="depends on the quantized weight, which was not given"):
        Vera().change(Vera().identity((4, 4), 2))
