"""FourierFT against stock PEFT and a least-squares problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jacobian import least_error
from peft import FourierFTConfig, get_peft_model

from quailora.core.metrics import Identity, shrunk
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError, TargetError
from quailora.families.fourierft import FourierFT
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.laws import INPUT_KINDS
from quailora.testing.stock import stock_layer

SMALL = FourierFT(n_frequency=60, scaling=300.0, random_loc_seed=3)


@pytest.mark.parametrize("family", [FourierFT(), SMALL])
def test_laws(family):
    check_family(family)
    check_identity(family, (32, 64), 4)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("shape", [(24, 16), (15, 20), (15, 17), (1, 64)])
@pytest.mark.parametrize("count", [40, 64])
def test_the_optimum(shape, count, kind):
    """With waves that are there twice, outputs whose waves are real, and odd sides."""
    objective, _ = objective_of(make_problem(*shape, kind))
    family = FourierFT(n_frequency=count)
    found = family.fit(objective, 4).error
    assert found == pytest.approx(least_error(family, objective), abs=1e-6 * objective.value_at_zero)


def test_all_frequencies_make_half_of_the_corrections():
    """Real entries make cosines alone: `C` is the same in both directions of both axes, as the even part of `E` is."""
    objective, base = objective_of(make_problem(15, 20))
    family = FourierFT(n_frequency=300)
    mirrored = objective.error.flip(0, 1).roll((1, 1), (0, 1))
    blind = replace(objective, metric=Identity(), mean=None)
    torch.testing.assert_close(family.fit(blind, 4).correction.dense(base), (objective.error + mirrored) / 2)


def test_calibration_pays():
    objective, _ = objective_of(make_problem(64, 48, "decaying"))
    assert FourierFT().fit(objective, 4).error < 0.5 * FourierFT().uncalibrated(objective, 4).error


def test_another_metric():
    """The equations' blocks are those of the metric that is minimized."""
    problem = make_problem(24, 16, "decaying")
    objective = Objective(problem.weight, shrunk(problem.statistics), base=lambda: problem.weight)
    assert SMALL.fit(objective, 4).error == pytest.approx(least_error(SMALL, objective), rel=1e-4)


def test_the_solution_is_linear_in_the_error():
    objective, base = objective_of(make_problem(24, 16))
    tenfold = Objective(10 * objective.error, objective.metric, base=objective.base)
    small, large = (SMALL.fit(each, 4).correction.dense(base) for each in (objective, tenfold))
    torch.testing.assert_close(10 * small, large, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 16), (15, 20), (17, 11)])
def test_stock_peft_has_the_same_waves(shape):
    config = FourierFTConfig(n_frequency=60, scaling=300.0, random_loc_seed=3, target_modules=["layer"])
    layer = get_peft_model(stock_layer(torch.zeros(shape), "float"), config).base_model.model.layer
    spectrum = layer.fourierft_spectrum["default"]
    assert spectrum.any()  # PEFT's own start is not the identity
    found = SMALL.change({"fourierft_spectrum": spectrum}, torch.zeros(shape)).weight
    torch.testing.assert_close(found, layer.get_delta_weight("default"))


def test_refusals():
    for fields, message in (
        ({"n_frequency": 0}, "Expected an n_frequency of at least 1, got 0."),
        ({"scaling": -1.0}, "Expected a scaling above 0, got -1.0."),
        ({"random_loc_seed": -1}, r"Expected a random_loc_seed from 0 to below 2\^63, got -1."),
    ):
        with pytest.raises(ConfigurationError, match=message):
            FourierFT(**fields)
    message = r"Expected an n_frequency from 1 to 384 for fourierft in a layer of shape \(24, 16\), got 1000."
    with pytest.raises(TargetError, match=message):
        FourierFT().shapes((24, 16), 8)
    with pytest.raises(ConfigurationError, match="The change that fourierft makes depends on the quantized weight"):
        SMALL.change({"fourierft_spectrum": torch.zeros(60)})
