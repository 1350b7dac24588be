"""Families of adapters on every device: where their tensors are, and that they leave the same error as on the CPU."""

from __future__ import annotations

import pytest
import torch

from quailora import FAMILIES, NF4, Initializer, Optimal
from quailora.testing import make_problem

PROBLEM = make_problem(64, 64, "decaying")
SIZES = {"c3a": {"block_size": 8}, "fourierft": {"n_frequency": 300}, "waveft": {"n_frequency": 300}}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(accelerator, name, request):
    if name == "shira" and "pretended" in request.node.callspec.id:
        pytest.skip("the pretended device has no sparse tensors")
    initializer = Initializer(NF4(), Optimal(), 4, family=FAMILIES[name](**SIZES.get(name, {})))
    found = initializer(PROBLEM.weight.to(accelerator), PROBLEM.statistics)
    expected = initializer(PROBLEM.weight, PROBLEM.statistics)
    parameters = found.correction.parameters
    assert {tensor.device.type for tensor in parameters.values()} == {accelerator}
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert found.error_uncalibrated == pytest.approx(expected.error_uncalibrated, rel=1e-3)
    base = found.quantized.dequantize()
    change = found.correction.change(base)
    assert change.weight.device.type == accelerator
    inputs = PROBLEM.inputs.float().to(accelerator)
    output = found.correction.family.output(parameters, inputs, base)
    whole = inputs @ change.weight.expand_as(base).T
    torch.testing.assert_close(output, whole if change.bias is None else whole + change.bias, rtol=1e-3, atol=1e-4)
    shared = found.correction.family.shared({"layer": (64, 64)}, 4)
    assert all(tensor.device.type == "cpu" for tensor in shared.values())
