"""Row and column weights from gradients (LQ-LoRA): against autograd by hand and against SciPy's decomposition."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from scipy.linalg import svd
from torch import nn
from torch.nn import functional

from quailora import NF4, SVD, Initializer, Optimal
from quailora.calibration.gradients import find_sensitivities, output_gradients, weight_gradient
from quailora.calibration.tokens import CalibrationTokens
from quailora.core.metrics import gram
from quailora.core.weightings import FisherWeighting, IdentityWeighting, Sensitivity
from quailora.errors import CalibrationError, NumericalError
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import load_model
from quailora.testing import make_problem


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "OPT"])
def test_sensitivities_are_means_of_squared_gradients(family):
    """Transposed weights among them; the model stays as it was."""
    model = make_model(family)
    layers = linear_layers(model)
    windows = torch.arange(3 * 20).reshape(3, 20) % 250
    found = find_sensitivities(model, layers, CalibrationTokens.of_windows(windows), "model")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    expected = {name: torch.zeros(layer.shape) for name, layer in layers.items()}
    for ids in windows:
        model.zero_grad()
        logits = model(ids[None]).logits[0, :-1]
        functional.cross_entropy(logits, ids[1:]).backward()
        for name, layer in layers.items():
            gradient = getattr(layer.module, layer.parameter).grad
            expected[name] += (gradient.T if layer.transposed else gradient).square() / 3
    for name, sensitivity in found.items():
        torch.testing.assert_close(sensitivity.rows.float(), expected[name].mean(1), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(sensitivity.columns.float(), expected[name].mean(0), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "OPT", "Bloom", "Gemma3", "Phi3", "Falcon"])
def test_gradients_of_outputs_make_those_of_weights(family):
    model = make_model(family)
    layers = linear_layers(model)
    ids = torch.arange(24).reshape(2, 12)
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def losses():
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return [functional.cross_entropy(logits, labels) for labels in (ids.flatten(), ids.flatten().flip(0))]

    found = []
    with output_gradients(model, layers) as caught:
        for loss in losses():
            loss.backward(retain_graph=True)
            found.append({name: weight_gradient(calls) for name, calls in caught.items()})
            caught.clear()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(parameter.grad is not None for parameter in model.parameters())
    for loss, one in zip(losses(), found, strict=True):
        assert list(layers) == sorted(one, key=list(layers).index)
        for name, layer in layers.items():
            (expected,) = torch.autograd.grad(loss, layer.module.weight, retain_graph=True)
            torch.testing.assert_close(one[name], expected.T if layer.transposed else expected, msg=name)


class Reused(nn.Module):
    """Runs one layer twice, another one by the name of its argument, and changes an output in place."""

    def __init__(self):
        super().__init__()
        self.twice, self.named = nn.Linear(6, 6), nn.Linear(6, 4, bias=False)

    def forward(self, hidden):
        found = self.twice(hidden)
        found *= 2
        return self.named(input=self.twice(found).relu_())


def test_gradients_of_layers_that_are_run_twice_or_changed_in_place(generator):
    model, hidden = Reused(), torch.randn(2, 5, 6, generator=generator)
    layers = {name: Layer(name, module) for name, module in model.named_children()}
    with output_gradients(model, layers) as caught:
        model(hidden).square().sum().backward()
        assert {name: len(calls) for name, calls in caught.items()} == {"twice": 2, "named": 1}
        found = {name: weight_gradient(calls) for name, calls in caught.items()}
    model(hidden).square().sum().backward()
    for name, layer in layers.items():
        torch.testing.assert_close(found[name], layer.module.weight.grad)
    assert hidden.grad is None


def test_the_weighted_optimum_against_scipy():
    problem = make_problem(12, 20)
    generator = torch.Generator().manual_seed(0)
    sensitivity = Sensitivity(
        torch.rand(12, generator=generator).double(), torch.rand(20, generator=generator).double()
    )
    layer = Initializer(NF4(block_size=32), Optimal(), 3, FisherWeighting())(
        problem.weight, problem.statistics, sensitivity
    )
    error = (problem.weight - layer.quantized.dequantize()).double()
    left, right = sensitivity.rows.sqrt()[:, None], sensitivity.columns.sqrt()
    u, s, vh = svd((left * error * right).numpy())
    best = torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3]) / left / right
    torch.testing.assert_close(layer.low_rank.dense().double(), best, rtol=1e-4, atol=1e-5)
    weighted = (left * (error - layer.low_rank.dense()) * right).square().sum().item()
    assert layer.low_rank.error == pytest.approx(weighted, rel=1e-4)
    assert weighted == pytest.approx((s[3:] ** 2).sum(), rel=1e-4)
    assert layer.error == pytest.approx(gram(problem.statistics).energy(error - layer.low_rank.dense()), rel=1e-4)


def test_equal_weights_are_the_plain_decomposition():
    problem = make_problem(10, 16)
    even = Sensitivity(torch.ones(10).double(), torch.ones(16).double())
    found = Initializer(NF4(block_size=32), Optimal(), 4, FisherWeighting())(problem.weight, problem.statistics, even)
    plain = Initializer(NF4(block_size=32), SVD(), 4, IdentityWeighting())(problem.weight, problem.statistics)
    torch.testing.assert_close(found.low_rank.dense(), plain.low_rank.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [torch.zeros(8), torch.eye(8)[0]])
def test_outputs_that_no_gradient_reached(rows):
    problem = make_problem(8, 12)
    blind = Sensitivity(rows.double(), torch.ones(12).double())
    found = Initializer(NF4(block_size=32), Optimal(), 2, FisherWeighting())(problem.weight, problem.statistics, blind)
    assert found.low_rank.dense().isfinite().all()
    assert found.error > 0


def test_what_is_missing_or_not_finite_is_named(tiny_llama):
    problem = make_problem(8, 12)
    with pytest.raises(CalibrationError, match="needs the Sensitivity of the layer"):
        Initializer(NF4(), Optimal(), 2, FisherWeighting())(problem.weight, problem.statistics)
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    name = list(layers)[-1]
    with torch.no_grad():
        layers[name].module.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"The gradient of .* is NaN or infinite"):
        find_sensitivities(model, layers, CalibrationTokens.of_windows(torch.arange(16)[None]))
