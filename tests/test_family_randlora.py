"""RandLoRA: its scalings against a least-squares solve by NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quailora.families.randlora import RandLora
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of


def test_laws():
    check_family(RandLora(projection_prng_key=7), bases=["float"])
    check_identity(RandLora(), (32, 64), 5)


@pytest.mark.parametrize("shape", [(24, 16), (16, 16), (16, 24)])
@pytest.mark.parametrize(("end", "slack"), [("randlora_lambda", 1e-4), ("randlora_gamma", 0.2)])
def test_neither_scaling_can_be_bettered_alone(shape, end, slack):
    """NumPy's least squares over one scaling, with the other one as it is: gamma is left where a step gains little."""
    problem = make_problem(*shape, "decaying", seed=3)
    objective, base = objective_of(problem)
    fit = RandLora().fit(objective, 5)
    found = {name: tensor.double() for name, tensor in fit.correction.parameters.items()}
    root = torch.linalg.cholesky(problem.statistics.second_moment)

    def weighted(scaling):
        return (RandLora().change({**found, end: scaling}, base).weight @ root).flatten()

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(weighted, found[end]).flatten(1).numpy()
    target = (objective.error.double() @ root).flatten().numpy()
    least = ((target - jacobian @ np.linalg.lstsq(jacobian, target)[0]) ** 2).sum()
    assert least * (1 - 1e-6) <= fit.error <= least * (1 + slack)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_calibrated_is_far_better_than_uncalibrated(shape):
    objective, _ = objective_of(make_problem(*shape, "decaying", seed=1))
    assert RandLora().fit(objective, 8).error < 0.7 * RandLora().uncalibrated(objective, 8).error


def test_no_error_leaves_the_start_of_peft():
    objective, _ = objective_of(make_problem(32, 24))
    found = RandLora().fit(replace(objective, error=torch.zeros(32, 24)), 4).correction.parameters
    torch.testing.assert_close(dict(found), dict(RandLora().identity((32, 24), 4)))
