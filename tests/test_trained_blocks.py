"""Corrections, and scales of a base, that are trained one block after the other while a model is initialized."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import content, killed_after, small_run, stopped_after_a_block
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quailora import NF4, Calibration, Int8, LoraScaling, Output, Sign, Uniform, initialize_model
from quailora.calibration.examples import BlockExamples
from quailora.errors import CalibrationError, ConfigurationError
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import RECIPES, find_recipe
from quailora.models.layers import Layer
from quailora.quantizers.identity import BaseIdentity

CALIBRATION = Calibration(samples=64, sequence_length=64, dtype="model")
JOINT = ("scales", "factors")
EVERY = ("codes", "scales", "factors")
TWO_BITS = Uniform(2, group_size=32)


def recipe(parts=JOINT, name="block-trained-joint", **options):
    """A recipe that trains for a few steps of two short windows."""
    rates = {"code_rate": 1e-3, "scale_rate": 1e-3, "factor_rate": 3e-4}
    blocks = BlockTraining(**{"steps": 40, "tokens": 256, "parts": parts, **rates, **options})
    return replace(RECIPES[name], blocks=blocks)


def made(model, of, quantizer=TWO_BITS, rank=4, **options):
    """What `initialize_model` makes in memory."""
    return initialize_model(str(model), of, CALIBRATION, scaling=LoraScaling(rank), base=quantizer, **options)


@pytest.fixture(scope="module")
def joint(tiny_llama):
    """A model with trained scales and corrections."""
    return made(tiny_llama, recipe())


@pytest.mark.parametrize(
    ("quantizer", "parts"),
    [(TWO_BITS, JOINT), (TWO_BITS, EVERY), (NF4(), JOINT), (NF4(), ("factors",)), (Int8(), ("factors",))],
    ids=repr,
)
def test_no_block_is_worse_than_its_closed_form_on_held_out_tokens(tiny_llama, parts, quantizer):
    name = "block-trained" if isinstance(quantizer, Int8) else "block-trained-joint"
    records = made(tiny_llama, recipe(parts, name), quantizer).output.records
    assert all(record.block_error_trained <= record.block_error for record in records)
    assert min(record.block_error_trained / record.block_error for record in records) < 1


def test_errors_are_those_of_the_outputs_by_definition(tiny_llama, joint):
    """The last block's, from two whole models on the held-out sequences."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokens = CALIBRATION.windows(joint.output.loaded.tokenizer)[3::4]  # every fourth sequence is held out

    def outputs():
        """What the last block returns, before the norm behind it."""
        found = []
        hook = model.model.layers[-1].register_forward_hook(lambda _, __, output: found.append(output))
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        hook.remove()
        return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]

    aim = outputs()
    with torch.no_grad():
        for name, stored in joint.output.finished.items():
            change = stored.correction.change(stored.dequantized).weight
            model.get_submodule(name).weight.copy_(stored.dequantized + change)
    errors = (outputs() - aim).square().sum(-1) / aim.square().sum(-1)
    last = joint.output.records[-1]
    torch.testing.assert_close(errors.mean().item(), last.block_error_trained, rtol=1e-4, atol=0)
    assert last.block_error_trained < last.block_error


def test_codes_stay_and_scales_move(joint):
    store = joint.output.run.store
    for name, trained in joint.output.finished.items():
        before = store.load(name).packed
        assert not torch.equal(trained.packed["scales"], before["scales"])
        assert torch.equal(trained.packed["qweight"], before["qweight"])
        assert torch.equal(trained.packed["qzeros"], before["qzeros"])


def test_the_stock_base_stays_what_it_is(tiny_llama, tmp_path):
    """Only the adapter is another one than in closed form."""
    trained = made(tiny_llama, recipe(("factors",), "block-trained"), NF4(), out=tmp_path / "out").output
    assert not (tmp_path / "out/base").exists()
    for record in trained.records:
        layer = trained.run.layers[record.name]
        assert record.base == BaseIdentity.of(NF4().quantize(layer.weight), layer.weight)
    assert any(record.block_error_trained < record.block_error for record in trained.records)


def test_a_model_in_memory_is_left_as_it_was(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = [{"input_ids": ids[None]} for ids in CALIBRATION.windows(tokenizer)]
    initialize_model(model, recipe(), batches, scaling=LoraScaling(4), base=TWO_BITS)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_a_base_that_is_there_gets_trained_corrections(tiny_llama, tmp_path):
    small_run(tiny_llama, tmp_path / "first", quantizer=TWO_BITS, save_base=True)
    base = tmp_path / "first/base"
    result = initialize_model(
        str(tiny_llama), recipe(("factors",), "block-trained"), CALIBRATION, scaling=LoraScaling(4), base=base
    )
    assert any(record.block_error_trained < record.block_error for record in result.output.records)
    assert not result.output.plan.method.changes_base


@pytest.fixture(scope="module")
def short_run(tiny_llama, tmp_path_factory):
    """Runs a short training, and the folder of one that nothing has ended."""

    def run(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RECIPES, "block-trained-joint", recipe(tokens=32, steps=5))
            return small_run(tiny_llama, out, recipe="block-trained-joint", quantizer=TWO_BITS)

    folder = tmp_path_factory.mktemp("short") / "alone"
    run(folder)
    return run, folder


@pytest.mark.parametrize("writes", [31, 35, 60])
def test_a_run_goes_on_where_it_ended(short_run, tmp_path, monkeypatch, writes):
    """Before, in and after the training of a block: bit by bit the same adapter and the same base."""
    run, alone = short_run
    with killed_after(writes, monkeypatch):
        run(tmp_path / "killed")
    run(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(alone)
    one, two = (load_file(folder / "base/model.safetensors") for folder in (alone, tmp_path / "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_training_is_not_done_again(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "block-trained-joint", recipe(tokens=32, steps=5))
    trained = []
    improve = BlockTraining.improve
    monkeypatch.setattr(BlockTraining, "improve", lambda *given: trained.append(given) or improve(*given))
    options = {"recipe": "block-trained-joint", "quantizer": TWO_BITS}
    with stopped_after_a_block(monkeypatch):
        small_run(tiny_llama, tmp_path / "out", **options)
    small_run(tiny_llama, tmp_path / "out", **options)
    assert len(trained) == 2  # blocks of the model


def test_a_damaged_layer_of_a_trained_block_is_trained_again(short_run, tmp_path, monkeypatch):
    """The layer from before the training is there as well, and is not what the others were trained with."""
    run, alone = short_run
    with stopped_after_a_block(monkeypatch):
        run(tmp_path / "out")
    damaged = next((tmp_path / "out.partial").rglob("layers/trained/*down_proj.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    run(tmp_path / "out")
    assert content(tmp_path / "out") == content(alone)
    assert (tmp_path / "out/report.json").read_text(encoding="utf-8").count('"block_error": null') == 0


def test_float16_has_gradients(generator):
    """Those of a mean over the tokens of large outputs are smaller than its smallest number."""
    module = torch.nn.Linear(256, 256, bias=False).half()
    layer = Layer("block.layer", module)
    inputs = 512 * torch.randn(2, 1, 1024, 256, generator=generator).half()
    aims = inputs @ layer.weight.detach().T
    weights = {"block.layer": TWO_BITS.quantize(layer.weight.detach())}
    examples = BlockExamples(0, "block", [0], [1], lambda number: module(inputs[number]), lambda number: aims[number])
    training = BlockTraining(steps=20, scale_rate=1e-2, parts=("scales",))
    found = training.improve(examples, {"block.layer": layer}, weights)
    assert found.after < 0.99 * found.before


def test_a_process_without_samples_is_told():
    examples = BlockExamples(0, "model.layers.0", [], [1], lambda _: None, lambda _: None, shared=True)
    with pytest.raises(CalibrationError, match="Expected samples to train on for each of 1 processes"):
        BlockTraining().improve(examples, {}, {})


def test_experts_stay_as_they_are_and_layers_beside_them_are_trained(tmp_path, tokenizer):
    make_model("Mixtral").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    of = recipe(("factors",), "block-trained", steps=5)
    result = made(tmp_path, of, NF4(), targets=["all-linear", "experts"], out=Output(tmp_path / "out", save_base=True))
    report = json.loads((result.folder / "report.json").read_text(encoding="utf-8"))
    kinds = {".experts." in layer["name"]: layer["block_error"] is None for layer in report["layers"]}
    assert kinds == {True: True, False: False}


@pytest.mark.parametrize("family", ["dora", "shira"])
def test_other_adapters_are_trained_too(tiny_llama, family):
    result = made(tiny_llama, recipe(("factors",), "block-trained"), NF4(), family=family)
    assert any(record.block_error_trained < record.block_error for record in result.output.records)


@pytest.mark.slow
def test_two_processes_train_one_block_together(tiny_llama, tmp_path):
    """Each with its own sequences; both end with the same adapter, which no other test can tell from here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "quailora"]
    command += ["init", str(tiny_llama), "--out", str(tmp_path / "two"), "--recipe", "block-trained-joint"]
    command += ["--samples", "96", "--sequence-length", "64", "--rank", "4"]
    command += ["--quantizer", "uniform", "--quantizer.bits", "2", "--quantizer.group_size", "32"]
    told = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert told.returncode == 0, told.stderr.decode()
    report = json.loads((tmp_path / "two/report.json").read_text(encoding="utf-8"))
    assert any(layer["block_error_trained"] < layer["block_error"] for layer in report["layers"])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_tokens_that_do_not_count_change_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    output, aim, noise = (torch.randn(2, 5, 4, generator=generator) for _ in range(3))
    counted = torch.rand(2, 5, generator=generator) < 0.6
    counted[0, 0] = True
    other = torch.where(counted[..., None], output, output + noise)
    examples = [
        BlockExamples(0, "a", [0], [0], lambda _, found=found: found, lambda _: aim, lambda _: counted)
        for found in (output, other)
    ]
    expected = ((output - aim)[counted].square().sum(-1) / aim[counted].square().sum(-1)).mean()
    for one in examples:
        torch.testing.assert_close(one.loss(0), expected)
        torch.testing.assert_close(one.mean_loss([0]), expected.item(), rtol=1e-5, atol=0)


def test_too_little_to_train_on_or_to_train_is_told(tiny_llama, caplog):
    made(tiny_llama, recipe(steps=1), Sign(32))
    assert "trained on 4096 tokens at most" in caplog.text
    assert "The base of Sign(group_size=32) stays as it is in the training of blocks" in caplog.text


def test_what_does_not_go_together_is_refused(tiny_llama, tmp_path):
    method = find_recipe("block-trained-joint").method(NF4(), LoraScaling(2))
    with pytest.raises(ConfigurationError, match="inputs have to be asymmetric, got full inputs"):
        replace(
            method, inputs="full", initializer=find_recipe("best").method(NF4(), LoraScaling(2)).initializer
        ).check()
    small_run(tiny_llama, tmp_path / "first", save_base=True)
    scales = replace(RECIPES["block-trained"], blocks=BlockTraining(parts=JOINT))
    with pytest.raises(ConfigurationError, match=r"quantized already.*would change it.*`parts=\(\"factors\",\)`"):
        made(tiny_llama, scales, tmp_path / "first/base")
    for parts in ((), ("zeros",)):
        with pytest.raises(ConfigurationError, match="Expected some of codes, scales, factors as trained parts"):
            BlockTraining(parts=parts)
