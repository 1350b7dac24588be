"""MiSS: its block against a least-squares solve by NumPy, and sums of unequal numbers of inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quailora.errors import TargetError
from quailora.families.miss import Miss
from quailora.testing import make_problem
from quailora.testing.families import objective_of, output_error
from quailora.testing.stock import load_stock, stock_layer


@pytest.mark.parametrize(("width", "rank"), [(48, 8), (48, 5), (48, 7), (50, 40)])
@pytest.mark.parametrize("kind", ["decaying", "rank-deficient", "massive channel"])
def test_the_block_is_the_least_squares_solution(width, rank, kind):
    """NumPy's solution over the inputs themselves, added up as a loop does it."""
    problem = make_problem(24, width, kind, seed=2)
    objective, base = objective_of(problem)
    fit = Miss().fit(objective, rank)
    sums = np.zeros((len(problem.inputs), rank))
    for number in range(width):
        sums[:, number % rank] += problem.inputs[:, number].numpy()
    target = problem.inputs.numpy() @ objective.error.double().numpy().T
    residual = target - sums @ np.linalg.lstsq(sums, target)[0]
    expected = (residual**2).sum() / len(target)
    assert output_error(objective, fit.correction.change(base), problem.inputs) == pytest.approx(expected, rel=1e-4)
    assert fit.error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("width", "rank"), [(48, 5), (48, 48), (50, 40)])
def test_stock_peft_pads_as_we_do(width, rank):
    """The forward pass, the merged weight, and our own product without a dense correction."""
    problem = make_problem(24, width, "decaying", seed=1)
    objective, base = objective_of(problem)
    correction = Miss().fit(objective, rank).correction
    loaded = load_stock(stock_layer(base, "float"), correction, rank)
    inputs, dense = problem.inputs.float(), correction.dense(base)
    torch.testing.assert_close(loaded(inputs), inputs @ (base + dense).T, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload().layer.weight, base + dense)
    batch = inputs[:6].reshape(2, 3, width)
    torch.testing.assert_close(Miss().output(correction.parameters, batch), batch @ dense.T)


def test_calibrated_is_far_better_than_uncalibrated():
    objective, _ = objective_of(make_problem(64, 48, "decaying", seed=1))
    assert Miss().fit(objective, 12).error < 0.6 * Miss().uncalibrated(objective, 12).error


def test_a_multiple_of_a_rank_is_not_worse():
    objective, _ = objective_of(make_problem(32, 48, "decaying", seed=3))
    errors = [Miss().fit(objective, rank).error for rank in (3, 6, 12, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * objective.value_at_zero  # as many sums as inputs: any correction at all


def test_a_rank_above_the_inputs_is_refused():
    with pytest.raises(
        TargetError, match=r"Expected a rank from 1 to 32 for '?miss'? in a layer of shape \(64, 32\), got"
    ):
        Miss().shapes((64, 32), 33)
