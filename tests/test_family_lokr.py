"""LoKr: its factors against least squares by NumPy, planted products, and the shapes that PEFT chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from regressions import least_error

from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError, TargetError
from quailora.families.lokr import LoKr, factors_of
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.stock import load_stock, stock_layer

FAMILIES = [LoKr(), LoKr(decompose_both=True, decompose_factor=16), LoKr(decompose_factor=2), LoKr(decompose_factor=5)]


@pytest.mark.parametrize("family", FAMILIES[1:], ids=repr)
def test_laws(family):
    check_family(family)
    check_identity(family, (32, 64), 4)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 12, 100])
def test_sides_are_those_of_peft(factor):
    for side in (*range(1, 200), 576, 1536, 4096):
        assert factors_of(side, factor) == factorization(side, factor)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_no_factor_can_be_bettered_alone(family):
    """Those of the matrix that was found last are exact, and a further round would gain little."""
    objective, _ = objective_of(make_problem(48, 32, "decaying", seed=3))
    fit = family.fit(objective, 3)
    found = fit.correction.parameters
    for end in found:
        least = least_error(family, objective, found, end)
        assert least <= fit.error * (1 + 1e-6)
        assert fit.error <= (1.0001 if end.startswith("lokr_w1") else 1.01) * least
    assert fit.error < 0.8 * family.uncalibrated(objective, 3).error
    norms = torch.stack([tensor.norm() for tensor in found.values()])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize("rank", [2, 8])
def test_a_planted_product_is_found(rank, generator):
    """With factors of `w2`, or whole."""
    objective = Objective(torch.empty(0, 0), gram(make_problem(48, 32, "decaying").statistics))
    first = torch.randn(6, 4, generator=generator)
    second = torch.randn(8, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    planted = replace(objective, error=torch.kron(first, second))
    fit = LoKr().fit(planted, rank)
    assert ("lokr_w2" in fit.correction.parameters) == (rank == 8)
    assert fit.error < 1e-8 * planted.value_at_zero


def test_directions_that_the_correction_does_not_have_can_be_trained():
    """A rank above the shorter side of `w2`; no error at all."""
    objective, _ = objective_of(make_problem(7, 96, seed=3))
    found = LoKr(decompose_factor=2).fit(objective, 20).correction.parameters
    assert found["lokr_w2_a"].shape == (7, 20)
    assert (found["lokr_w2_a"].any(0) | found["lokr_w2_b"].any(1)).all()
    nothing = LoKr().fit(replace(objective, error=torch.zeros(7, 96)), 2)
    assert nothing.error == 0
    assert sum(not tensor.any() for tensor in nothing.correction.parameters.values()) == 1


def test_stock_peft_fails_on_packed_weights():
    """The shape of an nf4 weight is that of its bytes."""
    problem = make_problem(48, 32, seed=3)
    objective, _ = objective_of(problem)
    loaded = load_stock(stock_layer(problem.weight, "nf4"), LoKr().fit(objective, 2).correction, 2)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        loaded(problem.inputs.float())
    assert "nf4" not in LoKr.bases


def test_refusals():
    with pytest.raises(ConfigurationError, match="Expected a decompose_factor of -1 or at least 1, got 0"):
        LoKr(decompose_factor=0)
    with pytest.raises(TargetError, match="Expected a rank of at least 1 for lokr, got 0"):
        LoKr().shapes((8, 8), 0)
