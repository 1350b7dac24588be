"""C3A against stock PEFT and a least-squares problem."""

from __future__ import annotations

import pytest
import torch
from jacobian import least_error
from peft import C3AConfig, get_peft_model

from quailora.errors import ConfigurationError, TargetError
from quailora.families.c3a import C3A
from quailora.testing import make_problem
from quailora.testing.families import check_family, check_identity, objective_of
from quailora.testing.laws import INPUT_KINDS
from quailora.testing.stock import load_stock, stock_layer


@pytest.mark.parametrize("size", [1, 8, 16])
def test_laws(size):
    check_family(C3A(block_size=size))
    check_identity(C3A(block_size=size), (32, 64), 4)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize(("size", "shape"), [(8, (16, 24)), (5, (15, 20)), (2, (6, 8))])
def test_the_optimum(size, shape, kind):
    objective, _ = objective_of(make_problem(*shape, kind))
    found = C3A(block_size=size).fit(objective, 4).error
    assert found == pytest.approx(least_error(C3A(block_size=size), objective), abs=1e-6 * objective.value_at_zero)


def test_calibration_pays():
    objective, _ = objective_of(make_problem(64, 48, "decaying"))
    family = C3A(block_size=16)
    assert family.fit(objective, 4).error < 0.8 * family.uncalibrated(objective, 4).error


def test_stock_peft_has_the_same_blocks(generator):
    """Its division by the number of inputs included."""
    kernel = torch.randn(2, 3, 8, generator=generator)
    module = get_peft_model(
        stock_layer(torch.zeros(16, 24), "float"), C3AConfig(block_size=8, target_modules=["layer"])
    )
    layer = module.base_model.model.layer
    assert layer.c3a_kernel["default"].any()  # PEFT's own start is not the identity
    layer.c3a_kernel["default"].data.copy_(kernel)
    torch.testing.assert_close(
        C3A(block_size=8).change({"c3a_kernel": kernel}).weight, layer.get_delta_weight("default")
    )


def test_stock_peft_computes_on_int8_but_merges_wrongly():
    """It adds the correction to the integer codes, without a word, so that merged weights are none."""
    problem = make_problem(32, 64, "decaying")
    correction = C3A(block_size=8).fit(objective_of(problem)[0], 4).correction
    inputs = problem.inputs.float()
    plain = stock_layer(problem.weight, "int8").forward(inputs)
    adapted = load_stock(stock_layer(problem.weight, "int8"), correction, 4)
    expected = plain + inputs @ correction.dense().T
    torch.testing.assert_close(adapted(inputs), expected)
    assert (adapted.merge_and_unload().forward(inputs) - expected).norm() > 0.9 * (expected - plain).norm()


def test_refusals():
    with pytest.raises(ConfigurationError, match="Expected a block_size of at least 1, got 0"):
        C3A(block_size=0)
    message = r"Expected a block_size that divides both sides of a layer of shape \(576, 192\) for c3a, got 256."
    with pytest.raises(TargetError, match=message):
        C3A().shapes((576, 192), 8)
