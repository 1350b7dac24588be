"""GraLoRA: blocks against their singular values, one factor against a solve by NumPy, and PEFT's layout."""

from __future__ import annotations

import pytest
import torch
from regressions import least_error
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from quailora.core.metrics import Identity
from quailora.core.objective import Objective
from quailora.errors import ConfigurationError, TargetError
from quailora.families.gralora import GraLora
from quailora.families.lora import Lora
from quailora.solvers import SVD
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.stock import load_stock, stock_layer


@pytest.mark.parametrize("family", [GraLora(gralora_k=4, hybrid_r=2)])
def test_laws(family):
    check_family(family, bases=["float"])  # other bases in the laws of all families
    check_identity(family, (32, 64), 8)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_without_inputs_each_block_is_cut_by_its_singular_values(k):
    error = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    blocks = error.double().view(k, 24 // k, k, 48 // k).transpose(1, 2)
    expected = torch.linalg.svdvals(blocks)[..., 12 // k :].square().sum().item()
    for solver in (GraLora().solver, SVD()):
        fit = GraLora(solver, gralora_k=k).fit(Objective(error, Identity()), 12)
        assert fit.error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("hybrid_r", [0, 4])
@pytest.mark.parametrize("kind", ["decaying", "rank-deficient", "massive channel"])
def test_no_factor_alone_has_much_to_gain(kind, hybrid_r):
    objective, _ = objective_of(make_problem(24, 36, kind, seed=2))
    family = GraLora(gralora_k=2, hybrid_r=hybrid_r)
    fit = family.fit(objective, 6)
    for end in fit.correction.parameters:
        least = least_error(family, objective, fit.correction.parameters, end)
        assert least <= fit.error * 1.001 + 1e-6 * objective.value_at_zero
        assert fit.error <= 1.02 * least + 1e-3 * objective.value_at_zero


def test_one_block_is_plain_lora():
    objective, _ = objective_of(make_problem(32, 48, "decaying", seed=3))
    assert GraLora(gralora_k=1).fit(objective, 4).error == pytest.approx(Lora().fit(objective, 4).error, rel=1e-4)


def test_calibrated_is_far_better_than_uncalibrated():
    objective, _ = objective_of(make_problem(64, 48, "decaying", seed=1))
    for family in (GraLora(), GraLora(gralora_k=4), GraLora(hybrid_r=4)):
        assert family.fit(objective, 4).error < 0.6 * family.uncalibrated(objective, 4).error


@pytest.mark.parametrize(("k", "hybrid_r"), [(2, 0), (3, 0), (3, 5)])
def test_peft_has_the_same_layout_and_scale(k, hybrid_r):
    """Its merged weight, its forward pass, and the product without a dense correction; `alpha / (r + hybrid_r)`."""
    problem = make_problem(24, 36, "decaying", seed=1)
    objective, base = objective_of(problem)
    family = GraLora(gralora_k=k, hybrid_r=hybrid_r)
    correction = family.fit(objective, 6).correction
    loaded = load_stock(stock_layer(base, "float"), correction, 6, alpha=33.0)
    layer = loaded.base_model.model.layer
    assert layer.scaling["default"] == family.scale(33.0, 6) == 33.0 / (6 + hybrid_r)
    dense, inputs = correction.dense(), problem.inputs.float()
    torch.testing.assert_close(layer.get_delta_weight("default"), dense)
    torch.testing.assert_close(loaded(inputs), inputs @ (base + dense).T, rtol=0, atol=1e-5)
    batch = inputs[:6].view(2, 3, 36)
    torch.testing.assert_close(family.output(correction.parameters, batch), batch @ dense.T)


def test_stock_peft_computes_it_on_torchao():
    problem = make_problem(24, 36, "decaying", seed=1)
    module, inputs = stock_layer(problem.weight, "float"), problem.inputs.float()
    quantize_(module, Int8WeightOnlyConfig())
    correction = GraLora(hybrid_r=2).fit(objective_of(problem)[0], 4).correction
    expected = module(inputs) + inputs @ correction.dense().T
    torch.testing.assert_close(load_stock(module, correction, 4)(inputs), expected, rtol=0, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="Expected a gralora_k of at least 1, got 0"):
        GraLora(gralora_k=0)
    with pytest.raises(ConfigurationError, match="Expected a hybrid_r of at least 0, got -1"):
        GraLora(hybrid_r=-1)
    for shape, rank in (((24, 36), 6), ((24, 34), 8), ((26, 36), 8)):
        with pytest.raises(TargetError, match=r"whose sides gralora_k=4 divides, got rank \d and shape \(2"):
            GraLora(gralora_k=4).shapes(shape, rank)
    with pytest.raises(TargetError, match=r"Expected a rank from 1 to 24 for .?gralora.? in a layer of"):
        GraLora(hybrid_r=25).shapes((24, 36), 4)
