"""One layer on every device: where its tensors are, and that they are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import each_quantizer, each_solver

from quailora import NF4, AlternatingLeastSquares, Initializer, InputStatistics, Optimal, Uniform
from quailora.adapters.lora import LoraScaling
from quailora.core.paired import PairedStatistics
from quailora.core.weightings import WEIGHTINGS, Sensitivity
from quailora.layer.asymmetric import initialize_asymmetric
from quailora.methods.recipes import RECIPES
from quailora.pipeline.layerwise import seeded
from quailora.quantizers import HQQ
from quailora.schedules import SRR, HeldOut, Once
from quailora.testing import make_problem

PROBLEM = make_problem(24, 64, "decaying")
WIDE = make_problem(320, 340, "decaying")  # the search for directions iterates
SENSITIVITY = Sensitivity(torch.arange(1.0, 25.0).double(), torch.arange(1.0, 65.0).double())


def assert_same_on(device, initializer, problem=PROBLEM, sensitivity=None):
    """Initialize a layer on a device, with statistics that are still on the CPU, and on the CPU."""
    with seeded("layer", 0):
        found = initializer(problem.weight.to(device), problem.statistics, sensitivity and on(device, sensitivity))
    with seeded("layer", 0):
        expected = initializer(problem.weight, problem.statistics, sensitivity)
    parts = found.low_rank.lora_A, found.low_rank.lora_B, found.low_rank.energies, found.quantized.dequantize()
    assert {tensor.device.type for tensor in (*parts, *found.quantized.tensors().values())} == {device}
    torch.testing.assert_close(parts[3].cpu(), expected.quantized.dequantize())
    torch.testing.assert_close(found.low_rank.dense().cpu(), expected.low_rank.dense(), rtol=1e-4, atol=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    return found


def on(device, sensitivity):
    return Sensitivity(*(getattr(sensitivity, name).to(device) for name in sensitivity.__dataclass_fields__))


@each_quantizer
def test_every_quantizer(accelerator, quantizer):
    assert assert_same_on(accelerator, Initializer(quantizer, Optimal(), 4)).quantized.digest


@each_solver
def test_every_solver(accelerator, solver):
    assert_same_on(accelerator, Initializer(NF4(), solver, 4))


def test_the_search_for_directions(accelerator):
    assert_same_on(accelerator, Initializer(Uniform(), Optimal(), 4), WIDE)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
def test_every_weighting(accelerator, weighting):
    assert_same_on(accelerator, Initializer(NF4(), Optimal(), 4, weighting()), sensitivity=SENSITIVITY)


ASYMMETRIC = {name: recipe for name, recipe in RECIPES.items() if recipe.inputs == "asymmetric"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ASYMMETRIC])
def test_every_recipe(accelerator, name):
    assert_same_on(accelerator, RECIPES[name].method(NF4(), LoraScaling(4)).initializer, sensitivity=SENSITIVITY)


def test_asymmetric_recipes_have_the_schedules_below():
    assert {recipe.schedule for recipe in ASYMMETRIC.values()} == {Once(), HeldOut(SRR())}


@pytest.mark.parametrize("schedule", [Once(), HeldOut(SRR())], ids=repr)
def test_asymmetric_inputs(accelerator, schedule):
    """With statistics that are still on the CPU, and with statistics that have been moved."""
    noisy = PROBLEM.inputs + 0.1 * PROBLEM.inputs.roll(1, 0)
    every, held_out = (PairedStatistics.from_inputs(PROBLEM.inputs[:n], noisy[:n]) for n in (136, 34))
    initializer = Initializer(Uniform(bits=3), Optimal(), 4, schedule=schedule)
    expected, share = initialize_asymmetric(initializer, PROBLEM.weight, every, held_out)
    weight = PROBLEM.weight.to(accelerator)
    for given in ((every, held_out), (every.to(accelerator), held_out.to(accelerator))):
        found, there = initialize_asymmetric(initializer, weight, *given)
        assert found.low_rank.lora_A.device.type == accelerator
        assert there == pytest.approx(share, rel=1e-3)
        torch.testing.assert_close(found.low_rank.dense().cpu(), expected.low_rank.dense(), rtol=1e-3, atol=1e-6)


def test_spent_directions_are_drawn_alike(accelerator):
    """A weight that needs no correction leaves trainable directions at random."""
    exact = NF4(double_quantization=False).quantize(PROBLEM.weight).dequantize()
    layers = []
    for where in (accelerator, "cpu"):
        with seeded("layer", 0):
            initializer = Initializer(NF4(double_quantization=False), AlternatingLeastSquares(), 4)
            layers.append(initializer(exact.to(where), PROBLEM.statistics))
    assert layers[0].low_rank.lora_A.any()
    torch.testing.assert_close(layers[0].low_rank.lora_A.cpu(), layers[1].low_rank.lora_A, rtol=0, atol=0)


def test_statistics_take_inputs_of_any_device(device):
    first, second = PROBLEM.inputs.float().split(70)
    mask = torch.rand(len(second), generator=torch.Generator().manual_seed(0)) < 0.5
    expected = InputStatistics.from_inputs(first)
    expected.update(second, mask)
    for home in ("cpu", device):
        found = InputStatistics(64, home)
        found.update(first.to(device))
        found.update(second, mask.to(device))
        assert found.second_moment.device.type == found.mean_magnitude.device.type == home
        torch.testing.assert_close(found.second_moment.cpu(), expected.second_moment)
        torch.testing.assert_close(found.mean_magnitude.cpu(), expected.mean_magnitude)
    there = expected.to(device)
    assert there.to(device) is there
    torch.testing.assert_close(there.to("cpu").second_moment, expected.second_moment)


def test_seeding_leaves_generators_of_other_devices_alone(device):
    before = torch.randn(3, device=device, generator=None)
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    with seeded("layer", 0):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert state[1] is None or torch.equal(torch.cuda.get_rng_state(), state[1])
    assert not torch.equal(torch.randn(3, device=device), before)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_hqq_finds_what_its_package_finds_on_a_cpu(device, bits, generator):
    hqq = pytest.importorskip("hqq.core.quantize")
    weight = torch.randn(60, 64, generator=generator)
    weight[:5], weight[5:10], weight[10:15] = 0, weight[5:10, :1], weight[10:15].abs() + 3
    weight[:, 0] *= 100
    options = {"nbits": bits, "group_size": 64, "axis": 1, "round_zero": bits == 4, "bitpack": False, "device": "cpu"}
    codes, found = hqq.Quantizer.quantize(weight.clone().cpu(), **options)
    expected = ((codes - found["zero"].half().float()) * found["scale"].half().float()).view(60, 64)
    quantized = HQQ(bits=bits).quantize(weight.to(device)).dequantize()
    torch.testing.assert_close(quantized.cpu(), expected, rtol=0, atol=0)
