"""HiRA: its factors against least squares by NumPy, and planted corrections."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import HiraConfig, get_peft_model
from regressions import least_error
from torch import nn

from quailora import LoraScaling, initialize_model
from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError, TargetError
from quailora.families.hira import Hira
from quailora.testing import make_problem
from quailora.testing.families import objective_of


def test_the_factors_are_near_their_optimum():
    """The left one, which is solved last, and the right one given that."""
    objective, base = objective_of(make_problem(40, 24, "decaying", seed=3))
    fit = Hira().fit(objective, 4)
    found = fit.correction.parameters
    for end, slack in (("hira_B", 1.05), ("hira_A", 1.5)):
        least = least_error(Hira(), objective, found, end, base)
        assert least <= fit.error * (1 + 1e-6)
        assert fit.error <= slack * least
    assert fit.error < 0.6 * Hira().uncalibrated(objective, 4).error
    torch.testing.assert_close(found["hira_A"].norm(), found["hira_B"].norm())


@pytest.mark.parametrize("kind", ["generic", "decaying"])
def test_most_of_a_planted_correction_is_found(kind, generator):
    base = torch.randn(64, 48, generator=generator)
    planted = torch.randn(64, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    objective = Objective(planted * base, gram(make_problem(64, 48, kind).statistics), base=lambda: base)
    assert Hira().fit(objective, 2).error < 0.05 * objective.value_at_zero


def test_weights_of_zero_and_no_error_leave_a_start_that_can_be_trained():
    objective, base = objective_of(make_problem(32, 24, seed=3))
    nothing = Hira().fit(replace(objective, error=torch.zeros(32, 24)), 4)
    assert nothing.error == 0
    assert nothing.correction.parameters["hira_A"].any(1).all()
    base[:3] = 0
    fit = Hira().fit(replace(objective, base=lambda: base), 4)
    assert fit.error < objective.value_at_zero
    assert all(tensor.isfinite().all() for tensor in fit.correction.parameters.values())


def test_stock_peft_ignores_ranks_of_single_layers(tiny_llama):
    """If this fails, that is over: `has_patterns` can be true."""
    with pytest.raises(ConfigurationError, match="PEFT has one rank for all layers of hira"):
        initialize_model(str(tiny_llama), "lorc", family="hira", scaling=LoraScaling(4, rank_pattern={"v_proj": 2}))
    config = HiraConfig(r=4, rank_pattern={"up": 2}, target_modules=["up"])
    model = get_peft_model(nn.Sequential(OrderedDict(up=nn.Linear(8, 8))), config)
    assert model.base_model.model.up.hira_A["default"].shape == (4, 8)


def test_refusals():
    with pytest.raises(TargetError, match=r"Expected a rank from 1 to 8 for .?hira.? in a layer of shape"):
        Hira().shapes((8, 24), 9)
    with pytest.raises(ConfigurationError, match="hira makes depends on the quantized weight, which was not given"):
        Hira().change({"hira_A": torch.ones(1, 4), "hira_B": torch.ones(4, 1)})
