"""`replace_lora_weights` takes the arguments of PEFT's `replace_lora_weights_loftq` and does what that promises."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from families import save_llama
from live import adapted, live_model, own_weight
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from quailora import SVD, Identity
from quailora.adapters.wrapped import wrapped_layers
from quailora.errors import ConfigurationError, ModelError, NumericalWarning, TargetError, WeightsNotFoundError
from quailora.pipeline.replace_weights import replace_lora_weights

IDS = torch.arange(48)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("replace") / "model", tokenizer)


def corrections(model):
    """Return what the adapter adds to the weight of each layer, computed by hand."""
    layers = wrapped_layers(model, "default")
    return {name: layer.scale * layer.parameters.lora_B @ layer.parameters.lora_A for name, layer in layers.items()}


def distance(model, folder):
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        return float((model(IDS).logits - expected).square().mean())


@pytest.mark.parametrize("kind", ["bitsandbytes-4", "bitsandbytes-8", "gptq", "hqq", "torchao"])
def test_factors_are_the_best_of_their_rank_on_every_base(kind, folder):
    model = adapted(folder, kind)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    layers = wrapped_layers(model, "default")
    quantized = {name: own_weight(kind, layer.base).float() for name, layer in layers.items()}
    replace_lora_weights(model, str(folder))
    for name, found in corrections(model).items():
        error = plain.get_submodule(name).weight.detach() - quantized[name]
        best = torch.linalg.svdvals(error.double())[8:].square().sum()
        torch.testing.assert_close((error - found).double().square().sum(), best, rtol=1e-3, atol=1e-12)


def test_the_model_comes_closer_to_full_precision(folder):
    model, untouched = adapted(folder, r=32), adapted(folder, r=32)
    replace_lora_weights(model, str(folder))
    assert distance(model, folder) < distance(untouched, folder) / 2.5


@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 4}}],
)
def test_any_scaling_gives_the_same_correction(options, folder):
    plain, scaled = adapted(folder, lora_alpha=8), adapted(folder, **options)
    for model in (plain, scaled):
        replace_lora_weights(model, str(folder))
    expected = corrections(plain)
    for name, found in corrections(scaled).items():
        if not ("down_proj" in name and "rank_pattern" in options):
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


def test_a_callback_decides_which_replacements_are_kept(folder):
    """A replacement that is not kept leaves the factors bit for bit as they were."""
    model, calls = adapted(folder), []
    before = {name: layer.kept() for name, layer in wrapped_layers(model, "default").items()}

    def keep_every_second(given, name):
        assert given is model
        assert any(parameter.any() for parameter in [wrapped_layers(model, "default")[name].parameters.lora_B])
        calls.append(name)
        return len(calls) % 2

    replace_lora_weights(model, str(folder), "default", keep_every_second)
    assert calls == list(before)
    for index, (name, layer) in enumerate(wrapped_layers(model, "default").items()):
        same = [torch.equal(*pair) for pair in zip(before[name], layer.parameters, strict=True)]
        assert all(same) if index % 2 else not any(same)


def test_a_greedy_callback_only_improves(folder):
    """The example of PEFT's documentation: keep what brings the logits closer to those of full precision."""
    model, best, kept = adapted(folder, r=32), float("inf"), []
    start = distance(adapted(folder, r=32), folder)

    def closer(given, name):
        nonlocal best
        found = distance(given, folder)
        kept.append(found < best)
        best = min(best, found)
        return kept[-1]

    with warnings.catch_warnings(action="error", category=NumericalWarning):
        replace_lora_weights(model, str(folder), callback=closer)
    assert distance(model, folder) == pytest.approx(best)
    assert best < start
    assert True in kept


def test_running_the_model_in_a_callback_changes_no_other_layer(folder):
    """bitsandbytes rounds the scales of layers that run on some processors."""
    with_callback, without = adapted(folder).eval(), adapted(folder)

    def run(model, _):
        with torch.no_grad():
            model(IDS)
        return True

    replace_lora_weights(with_callback, str(folder), callback=run)
    replace_lora_weights(without, str(folder))
    expected = corrections(without)
    for name, found in corrections(with_callback).items():
        assert torch.equal(found, expected[name])


def test_parameters_stay_the_same_objects(folder):
    """An optimizer that holds them already goes on with the new values."""
    model = adapted(folder)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    replace_lora_weights(model, str(folder))
    now = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(parameters, now, strict=True))
    model(IDS, labels=IDS).loss.backward()
    before = corrections(model)
    optimizer.step()
    assert all(not torch.equal(found, before[name]) for name, found in corrections(model).items())


def test_another_adapter_is_chosen_by_name(folder):
    model = adapted(folder)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    replace_lora_weights(model, str(folder), adapter_name="second")
    assert not any(correction.any() for correction in corrections(model).values())
    assert all(layer.parameters.lora_B.any() for layer in wrapped_layers(model, "second").values())
    with pytest.raises(ConfigurationError, match=r"got 'third'. It has default, second"):
        replace_lora_weights(model, str(folder), adapter_name="third")


def sharded(folder, to):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(to, max_shard_size="50KB")
    assert (to / "model.safetensors.index.json").is_file()
    return to


def without_prefix(folder, to):
    """As models saved without their head have them."""
    to.mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    "place",
    [
        lambda folder, _: folder / "model.safetensors",
        lambda folder, to: shutil.copy(folder / "model.safetensors", to.with_name("other-model.safetensors")),
        sharded,
        lambda folder, to: sharded(folder, to) / "model.safetensors",
        without_prefix,
    ],
    ids=["file", "file of another name", "shards", "name of a file beside shards", "without prefix"],
)
def test_every_path_that_peft_takes(place, folder, tmp_path):
    expected, model = adapted(folder), adapted(folder)
    replace_lora_weights(expected, str(folder))
    replace_lora_weights(model, str(place(folder, tmp_path / "copy")))
    wanted = corrections(expected)
    assert all(torch.equal(found, wanted[name]) for name, found in corrections(model).items())


def test_layers_that_hold_their_weights_turned(tmp_path):
    """GPT-2 keeps (in_features, out_features), and bitsandbytes turns them while it quantizes."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model, untouched = (adapted(tmp_path, target_modules=["c_attn", "c_proj", "c_fc"], r=32) for _ in range(2))
    replace_lora_weights(model, str(tmp_path))
    assert distance(model, tmp_path) < distance(untouched, tmp_path) / 2


def test_what_is_missing_is_named(folder, tmp_path):
    """With the kinds of errors that PEFT's function raises."""
    with pytest.raises(ValueError, match="as model_path"):
        replace_lora_weights(adapted(folder))
    with pytest.raises(FileNotFoundError, match=r"Expected model.safetensors or model.safetensors.index.json in"):
        replace_lora_weights(adapted(folder), str(tmp_path))
    with pytest.raises(WeightsNotFoundError, match="could not be found"):
        replace_lora_weights(adapted(folder), str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="Expected a PeftModel, got LlamaForCausalLM"):
        replace_lora_weights(live_model("bitsandbytes-4", folder), str(folder))
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="all 2 of them are in full precision"):
        replace_lora_weights(plain, str(folder))


def test_weights_of_another_model_are_refused(folder, tokenizer, tmp_path):
    other = save_llama(tmp_path / "wide", tokenizer, intermediate_size=96)
    with pytest.raises(ModelError, match=r"layers.0.mlp.gate_proj: .*These are two different models"):
        replace_lora_weights(adapted(folder, target_modules=["gate_proj"]), str(other))
    small = save_llama(tmp_path / "short", tokenizer, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"layers.1.mlp.gate_proj in .*it is not there"):
        replace_lora_weights(adapted(folder, target_modules=["gate_proj"]), str(small))
    live_model("bitsandbytes-4", folder).save_pretrained(tmp_path / "quantized")
    with pytest.raises(ModelError, match=r"Pass the model that was not quantized"):
        replace_lora_weights(adapted(folder), str(tmp_path / "quantized"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "Expected plain LoRA in .*DoraLinearVariant"),
        ({"init_lora_weights": "olora"}, "got init_lora_weights='olora'"),
    ],
)
def test_adapters_that_are_no_correction_are_refused(options, message, folder):
    with pytest.raises(ConfigurationError, match=message):
        replace_lora_weights(adapted(folder, **options), str(folder))


def test_more_that_is_refused(folder):
    merged = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    with pytest.raises(ConfigurationError, match="is merged into"):
        replace_lora_weights(merged, str(folder))
    sharded_away = adapted(folder)
    next(iter(wrapped_layers(sharded_away, "default").values())).parameters.lora_A.data = torch.empty(0)
    with pytest.raises(ConfigurationError, match="before the trainer prepares the model for sharding"):
        replace_lora_weights(sharded_away, str(folder))
    embedding = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["embed_tokens"])
    )
    with pytest.raises(TargetError, match=r"there are none. Its target_modules are"):
        replace_lora_weights(embedding, str(folder))
    with pytest.warns(NumericalWarning, match="The factors of this adapter are bfloat16"):
        replace_lora_weights(adapted(folder).to(torch.bfloat16), str(folder))


def test_what_peft_saves_is_loaded_again(folder, tmp_path):
    model = adapted(folder)
    replace_lora_weights(model, str(folder))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(live_model("bitsandbytes-4", folder), tmp_path)
    expected = corrections(model)
    assert all(torch.equal(found, expected[name]) for name, found in corrections(loaded).items())


def test_it_is_the_solver_of_the_command_line(folder):
    model = adapted(folder)
    replace_lora_weights(model, str(folder))
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    layer = wrapped_layers(model, "default")["model.layers.0.mlp.up_proj"]
    error = weight - own_weight("bitsandbytes-4", layer.base)
    found = SVD().solve(error, Identity(), 8)
    torch.testing.assert_close(layer.parameters.lora_A.detach(), found.lora_A)
    assert isinstance(layer.base, nn.Module)
