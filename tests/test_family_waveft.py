"""WaveFT against stock PEFT and a least-squares problem."""

from __future__ import annotations

import pytest
import torch
from jacobian import least_error
from peft import WaveFTConfig, get_peft_model
from peft.tuners.waveft.waverec2d import waverec2d

from quailora.errors import ConfigurationError, TargetError
from quailora.families.waveft import WaveFT, haar, inverse_haar
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.laws import INPUT_KINDS
from quailora.testing.stock import stock_layer

SMALL = WaveFT(n_frequency=100, scaling=3.0, random_loc_seed=5)
SPARSE = WaveFT(n_frequency=100, use_idwt=False)


@pytest.mark.parametrize("family", [SMALL, SPARSE])
def test_laws(family):
    check_family(family)
    check_identity(family, (32, 64), 4)


def test_laws_of_the_default():
    check_family(WaveFT())


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("shape", [(24, 16), (15, 20), (16, 15), (15, 17)])
@pytest.mark.parametrize("family", [SMALL, SPARSE])
def test_the_optimum(family, shape, kind):
    objective, _ = objective_of(make_problem(*shape, kind))
    found = family.fit(objective, 4).error
    assert found == pytest.approx(least_error(family, objective), abs=1e-6 * objective.value_at_zero)


def test_calibration_pays():
    objective, _ = objective_of(make_problem(64, 48, "decaying"))
    assert WaveFT().fit(objective, 4).error < 0.5 * WaveFT().uncalibrated(objective, 4).error


def test_the_inverse_transform_is_that_of_peft(generator):
    """PEFT's detail coefficients are those of rows, of columns, and of both."""
    transform = torch.randn(12, 8, generator=generator)
    sums, rows = transform[:6].chunk(2, 1), transform[6:].chunk(2, 1)
    expected = waverec2d((sums[0], (rows[0], sums[1], rows[1])), "db1")
    torch.testing.assert_close(inverse_haar(transform), expected)
    torch.testing.assert_close(haar(expected), transform)


def test_an_odd_side_counts_as_if_a_zero_followed(generator):
    matrix = torch.randn(7, 5, generator=generator)
    padded = torch.zeros(8, 6)
    padded[:7, :5] = matrix
    torch.testing.assert_close(inverse_haar(haar(matrix)), padded)


@pytest.mark.parametrize("shape", [(24, 16), (15, 20), (16, 15), (15, 17)])
@pytest.mark.parametrize("use_idwt", [True, False])
def test_stock_peft_has_the_same_waves(shape, use_idwt):
    family = WaveFT(n_frequency=100, scaling=3.0, random_loc_seed=5, use_idwt=use_idwt)
    config = WaveFTConfig(**family.config({}) | {"init_weights": False}, target_modules=["layer"])
    layer = get_peft_model(stock_layer(torch.zeros(shape), "float"), config).base_model.model.layer
    found = family.change({"waveft_spectrum": layer.waveft_spectrum["default"]}, torch.zeros(shape)).weight
    torch.testing.assert_close(found, layer.get_delta_weight("default"))


def test_refusals():
    with pytest.raises(ConfigurationError, match="Expected an n_frequency of at least 1, got 0"):
        WaveFT(n_frequency=0)
    message = r"Expected an n_frequency from 1 to 2048 for waveft in a layer of shape \(32, 64\), got 2592."
    with pytest.raises(TargetError, match=message):
        WaveFT().shapes((32, 64), 8)
    with pytest.raises(ConfigurationError, match="The change that waveft makes depends on the quantized weight"):
        SMALL.change({"waveft_spectrum": torch.zeros(100)})
