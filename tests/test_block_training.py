"""Codes and scales that are trained one block of a model after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import save_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quailora import NF4, Int8, Uniform
from quailora.calibration.blocks import find_chain
from quailora.calibration.sources import BatchCalibration
from quailora.errors import ConfigurationError, NumericalError
from quailora.methods.block_training import BlockTraining
from quailora.methods.trained_codes import TrainedCodes, computing_with
from quailora.models.layers import linear_layers

TRAINING = BlockTraining(steps=60, tokens=128, windows=24, sequence_length=32)
FORMATS = [NF4(), NF4(double_quantization=False), Uniform(3, group_size=32), Uniform(2, symmetric=True, group_size=32)]
each_format = pytest.mark.parametrize("quantizer", FORMATS, ids=repr)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Folder of a small model."""
    return save_llama(tmp_path_factory.mktemp("blocks") / "model", tokenizer)


@pytest.fixture
def model(place):
    """The small model."""
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.fixture
def windows(generator):
    """Windows to train on, and others that are held out."""
    source = BatchCalibration.of([{"input_ids": torch.randint(1, 200, (40, 32), generator=generator)}])
    return TRAINING.drawn(source, None)


def block_errors(model, layers, weights, ids):
    """The error of each block's outputs by the definition, from two whole models, mean over tokens."""
    own = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    states = []
    for chosen in (own, {name: weight.dequantize() for name, weight in weights.items()}):
        with torch.no_grad():
            for name, layer in layers.items():
                layer.module.weight.copy_(chosen.get(name, own[name]))
            # The last of these is behind the norm of the whole model.
            states.append(model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:])
    with torch.no_grad():
        for name, layer in layers.items():
            layer.module.weight.copy_(own[name])
    return [
        ((found - aim).square().sum(-1) / aim.square().sum(-1)).mean().item()
        for aim, found in zip(*states, strict=True)
    ]


@each_format
def test_outputs_of_blocks_come_closer_on_held_out_windows(model, windows, quantizer):
    layers = linear_layers(model)
    before = {name: quantizer.quantize(layer.weight) for name, layer in layers.items()}
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    found = TRAINING.train(find_chain(model, windows[0][:1, :8]), layers, before, *windows, "model")
    first, trained = (block_errors(model, layers, one, windows[1]) for one in (before, found))
    assert trained[0] <= first[0]  # whose inputs are the same in both
    assert trained[-1] < 0.9 * first[-1]
    for name, weight in found.items():
        assert (weight.nbytes, weight.shape, type(weight)) == (
            before[name].nbytes, before[name].shape, type(before[name]),
        )  # fmt: skip
        assert torch.equal(layers[name].weight, weights[name])  # the model is as it was
        assert layers[name].module.weight.requires_grad


def test_what_does_not_help_is_not_taken(model, windows):
    """Training on windows of one token makes others worse; each block keeps what it had."""
    layers = linear_layers(model)
    before = {name: Uniform(8, group_size=32).quantize(layer.weight) for name, layer in layers.items()}
    useless = torch.ones_like(windows[0])
    coarse = replace(TRAINING, code_rate=1.0, scale_rate=0.5)
    found = coarse.train(find_chain(model, windows[0][:1, :8]), layers, before, useless, windows[1], "model")
    assert {name: one.digest for name, one in found.items()} == {name: one.digest for name, one in before.items()}


def test_a_run_that_goes_on_ends_with_the_same_weights(model, windows):
    layers = linear_layers(model)
    before = {name: NF4().quantize(layer.weight) for name, layer in layers.items()}
    chain, blocks = find_chain(model, windows[0][:1, :8]), []
    whole = TRAINING.train(chain, layers, before, *windows, "model", on_block=blocks.append)
    assert len(blocks) == len(model.model.layers)
    again = []
    found = TRAINING.train(chain, layers, before, *windows, "model", earlier=blocks[0], on_block=again.append)
    assert [one.keys() for one in again] == [one.keys() for one in blocks[1:]]
    assert {name: one.digest for name, one in found.items()} == {name: one.digest for name, one in whole.items()}


def test_formats_without_codes_to_train_stay(model, windows):
    layers = linear_layers(model)
    before = {name: Int8().quantize(layer.weight) for name, layer in layers.items()}
    called = []
    found = TRAINING.train(
        find_chain(model, windows[0][:1, :8]), layers, before, *windows, "model", on_block=called.append
    )
    assert found == before
    assert not called


@each_format
def test_places_begin_at_their_codes(quantizer, generator):
    weight = torch.randn(16, 64, generator=generator)
    stored = quantizer.quantize(weight)
    # An aim that is levels away, as after error feedback, begins at the code all the same.
    codes = TrainedCodes(stored, weight + 3 * weight.std())
    torch.testing.assert_close(codes.weight().code_matrix(), stored.code_matrix())
    torch.testing.assert_close(codes.values().detach(), stored.dequantize(), rtol=1e-6, atol=1e-7)
    codes.follow()
    torch.testing.assert_close(codes.values().detach(), stored.dequantize(), rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), which=st.integers(0, len(FORMATS) - 1))
def test_numbers_are_the_levels_nearest_to_their_places(seed, which):
    generator = torch.Generator().manual_seed(seed)
    stored = FORMATS[which].quantize(torch.randn(8, 64, generator=generator))
    codes = TrainedCodes(stored, torch.randn(8, 64, generator=generator))
    with torch.no_grad():
        codes.places += 3 * torch.randn(8, 64, generator=generator)
    codes.follow()
    nearest = codes.places.detach().round().clamp(0, stored.code_count - 1)
    torch.testing.assert_close(codes.values().detach(), stored.decode(nearest).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(codes.weight().code_matrix().float(), nearest)


def test_gradients_are_those_of_the_weight(generator):
    """Of scales, the derivative; of places, that of the numbers themselves, as if nothing were rounded."""
    stored = Uniform(4, group_size=32).quantize(torch.randn(8, 64, generator=generator))
    layer = torch.nn.Linear(64, 8)
    inputs = torch.randn(5, 64, generator=generator)
    codes = TrainedCodes(stored, stored.dequantize())
    factors = torch.zeros(stored.scale_count, requires_grad=True)
    numbers = stored.dequantize().requires_grad_()
    aim = functional.linear(inputs, numbers * (1 + stored.spread(factors)), layer.bias).square().sum()
    expected = torch.autograd.grad(aim, [numbers, factors])
    found = functional.linear(inputs, codes.values(), layer.bias).square().sum()
    found.backward()
    codes.pass_gradient_on()
    torch.testing.assert_close(codes.places.grad, expected[0])
    torch.testing.assert_close(codes.changes.grad, expected[1])


def test_layers_compute_with_trained_weights_and_with_their_own_again(model):
    layers = linear_layers(model)
    name, layer = next(iter(layers.items()))
    inputs = torch.randn(3, layer.weight.shape[1])
    codes = TrainedCodes(NF4().quantize(layer.weight), layer.weight.detach())
    before = layer.module(inputs)
    with computing_with(layers, {name: codes}):
        torch.testing.assert_close(layer.module(inputs), functional.linear(inputs, codes.values()))
    torch.testing.assert_close(layer.module(inputs), before, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_ends_the_training(model, windows):
    layers = linear_layers(model)
    before = {name: NF4(double_quantization=False).quantize(layer.weight) for name, layer in layers.items()}
    wild = replace(TRAINING, scale_rate=1e30)
    with pytest.raises(NumericalError, match=r"The loss of the training of model\.layers\.0 is .*Lower its learning"):
        wild.train(find_chain(model, windows[0][:1, :8]), layers, before, *windows, "model")


@pytest.mark.parametrize(
    "changes", [{"steps": -1}, {"tokens": 1}, {"windows": 0}, {"code_rate": 0.0}, {"scale_rate": float("inf")}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match="Expected"):
        replace(TRAINING, **changes)
