"""LoHa: its factors against least squares by NumPy and against plain LoRA, and the bases of stock PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from regressions import least_error

from quailora import Optimal
from quailora.errors import TargetError
from quailora.families import Lora
from quailora.families.loha import LoHa
from quailora.testing import make_problem
from quailora.testing.families import objective_of
from quailora.testing.stock import load_stock, stock_layer


def test_no_factor_can_be_bettered_by_much_alone():
    objective, _ = objective_of(make_problem(40, 24, "decaying", seed=3))
    fit = LoHa().fit(objective, 3)
    found = fit.correction.parameters
    for end in found:
        least = least_error(LoHa(), objective, found, end)
        assert least <= fit.error * (1 + 1e-6)
        assert fit.error <= (1.0001 if end == "hada_w1_a" else 1.05) * least
    assert fit.error < 0.5 * LoHa().uncalibrated(objective, 3).error
    norms = torch.stack([tensor.norm() for tensor in found.values()])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize("kind", ["generic", "decaying", "massive channel"])
def test_better_than_lora_with_as_many_numbers(kind):
    """It starts from LoRA of its own rank, and has twice its factors."""
    objective, _ = objective_of(make_problem(64, 48, kind, seed=3))
    assert LoHa().count((64, 48), 4) == Lora().count((64, 48), 8)
    assert LoHa().fit(objective, 4).error < Optimal().minimise(objective, 8).error
    assert LoHa().fit(objective, 2).error < 0.9 * Optimal().minimise(objective, 2).error


def test_no_error_leaves_a_start_that_can_be_trained():
    """One factor of zeros; an output without an error has a row of zeros in one factor."""
    objective, _ = objective_of(make_problem(32, 24, seed=3))
    nothing = LoHa().fit(replace(objective, error=torch.zeros(32, 24)), 4)
    assert nothing.error == 0
    assert sum(not tensor.any() for tensor in nothing.correction.parameters.values()) == 1
    objective.error[5] = 0
    found = LoHa().fit(replace(objective, error=objective.error), 4).correction.parameters
    assert not found["hada_w1_a"][5].any()
    assert found["hada_w2_a"][5].any()


def test_stock_peft_fails_on_packed_weights():
    """It makes factors for the shape of the bytes of an nf4 weight."""
    problem = make_problem(48, 32, seed=3)
    objective, _ = objective_of(problem)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_stock(stock_layer(problem.weight, "nf4"), LoHa().fit(objective, 2).correction, 2)
    assert "nf4" not in LoHa.bases


def test_refusals():
    with pytest.raises(TargetError, match=r"Expected a rank from 1 to 8 for .?loha.? in a layer of shape"):
        LoHa().shapes((8, 24), 9)
