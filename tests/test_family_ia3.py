"""IA3: its scales against a least-squares solve by NumPy, and what PEFT is told of the side that is scaled."""

from __future__ import annotations

import pytest
import torch
from regressions import least_error

from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError
from quailora.families.ia3 import Ia3
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.stock import load_stock, stock_layer

SIDES = ["outputs", "inputs"]


@pytest.mark.parametrize("scaled", SIDES)
def test_laws(scaled):
    check_family(Ia3(scaled))
    check_identity(Ia3(scaled), (32, 64), 4)


@pytest.mark.parametrize("kind", ["decaying", "rank-deficient", "dead channels", "single token"])
@pytest.mark.parametrize("scaled", SIDES)
def test_no_scales_have_a_smaller_error(scaled, kind):
    """Singular moments included."""
    objective, base = objective_of(make_problem(40, 24, kind, seed=3))
    fit = Ia3(scaled).fit(objective, 1)
    least = least_error(Ia3(scaled), objective, fit.correction.parameters, "ia3_l", base)
    assert fit.error == pytest.approx(least, rel=1e-5)
    if kind == "decaying":
        assert fit.error < 0.9 * Ia3(scaled).uncalibrated(objective, 1).error


@pytest.mark.parametrize("scaled", SIDES)
def test_planted_scales_are_found(scaled, generator):
    """Negative ones, too; an output and an input without weights keep the scale of one."""
    base = torch.randn(20, 12, generator=generator)
    base[3], base[:, 5] = 0, 0
    scales = torch.randn((20, 1) if scaled == "outputs" else (1, 12), generator=generator)
    metric = gram(make_problem(20, 12, seed=1).statistics)
    found = Ia3(scaled).fit(Objective((scales - 1) * base, metric, base=lambda: base), 1).correction.parameters["ia3_l"]
    scales[(3, 0) if scaled == "outputs" else (0, 5)] = 1
    torch.testing.assert_close(found, scales)


@pytest.mark.parametrize("scaled", SIDES)
def test_stock_peft_scales_that_side(scaled):
    """Without `feedforward_modules` PEFT would ask for the architecture of the model."""
    objective, base = objective_of(make_problem(24, 24, seed=5))
    loaded = load_stock(stock_layer(base, "float"), Ia3(scaled).fit(objective, 1).correction, 1)
    assert loaded.base_model.model.layer.is_feedforward == (scaled == "inputs")
    assert loaded.peft_config["default"].feedforward_modules is not None


def test_refusals():
    with pytest.raises(ConfigurationError, match="ia3 makes depends on the quantized weight, which was not given"):
        Ia3().change({"ia3_l": torch.ones(4, 1)})
