"""RoAd: its rotations against least squares by NumPy for each output or pair, and against PEFT's own matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.tuners.road.layer import _get_delta_weight

from quailora.errors import ConfigurationError, TargetError
from quailora.families.road import Road
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of

VARIANTS = ["road_1", "road_2", "road_4"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_laws(variant):
    check_family(Road(variant, 16))
    check_identity(Road(variant, 8), (32, 64), 4)


def least_by_hand(variant, group_size, objective, base, root):
    """The least error, with the rows of each pair written out."""
    total, half = 0.0, group_size // 2
    target, rows = (((objective.error + base).double() @ root).numpy(), (base.double() @ root).numpy())
    for first in (start + place for start in range(0, len(rows), group_size) for place in range(half)):
        a, b = rows[first], rows[first + half]
        parts = [(np.stack([a, -b], 1), target[first]), (np.stack([b, a], 1), target[first + half])]
        if variant == "road_1":
            parts = [tuple(np.concatenate(each) for each in zip(*parts, strict=True))]
        total += sum(((y - X @ np.linalg.lstsq(X, y, rcond=1e-12)[0]) ** 2).sum() for X, y in parts)
    return total


@pytest.mark.parametrize("kind", ["decaying", "single token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rotations_have_a_smaller_error(variant, kind):
    problem = make_problem(48, 20, kind, seed=3)
    objective, base = objective_of(problem)
    values, vectors = torch.linalg.eigh(problem.statistics.second_moment)
    least = least_by_hand(variant, 16, objective, base, vectors * values.clamp(min=0).sqrt())
    fit = Road(variant, 16).fit(objective, 1)
    assert fit.error == pytest.approx(least, rel=1e-4, abs=1e-6 * objective.value_at_zero)
    if kind == "decaying":
        assert fit.error < 0.9 * Road(variant, 16).uncalibrated(objective, 1).error


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_change_is_that_of_the_matrix_of_peft(variant):
    """PEFT merges with this matrix, and multiplies outputs without it."""
    objective, base = objective_of(make_problem(32, 20, seed=3))
    found = Road(variant, 8).fit(objective, 1).correction
    matrix = _get_delta_weight(variant, 8, *(found.parameters[name] for name in ("road_theta", "road_alpha")))
    torch.testing.assert_close(found.dense(base), matrix @ base - base, rtol=0, atol=1e-6)


def test_every_angle_is_trained():
    """In road_4 an angle of zero beside a length for the cosine alone would have no gradient."""
    objective, base = objective_of(make_problem(32, 20, seed=3))
    found = Road("road_4", 8).fit(objective, 1).correction.parameters
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in found.items()}
    with torch.enable_grad():
        weight = Road("road_4", 8).change(parameters, base).weight
        gradients = torch.autograd.grad(weight.square().sum(), list(parameters.values()))
    assert all(gradient.all() for gradient in gradients)


def test_refusals():
    with pytest.raises(TargetError, match="Expected outputs in whole groups of group_size=64 for road, got a layer of"):
        Road().shapes((96, 64), 1)
    with pytest.raises(ConfigurationError, match="Expected a group_size that is even and positive, got 7"):
        Road(group_size=7)
