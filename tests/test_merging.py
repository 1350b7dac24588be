"""What training has changed, for adapters of every family: found, compared with stock PEFT, and merged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import make_model, save_llama
from helpers import init
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainings import effective_weights, train
from transformers import AutoModelForCausalLM

from quailora import FAMILIES, NF4, Calibration, LoraScaling, Optimal, Output, Resources, initialize_model, merge_full
from quailora.adapters.change import TrainedChange
from quailora.adapters.convert import convert
from quailora.errors import ConfigurationError, ModelError, OutputExistsError
from quailora.models.layers import all_layers, linear_layers

CALIBRATION = Calibration(samples=4, sequence_length=64)
SIZES = {"c3a": {"block_size": 32}, "fourierft": {"n_frequency": 200}, "waveft": {"n_frequency": 200}}
SIZES["road"] = {"group_size": 16}
BIASED = ("lora_bias", "beft")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("merging") / "model", tokenizer)


def start_of(folder, name, out, **options):
    """Write a start of a family, with its base in floating point."""
    family = FAMILIES[name](**SIZES.get(name, {}))
    scaling = None if family.default_rank is None else LoraScaling(4, 6.0 if family.scales else None)
    written = Output(out, save_base=True, base_format="dequantized", **options)
    initialize_model(str(folder), "quailora", CALIBRATION, family=family, scaling=scaling, base=NF4(), out=written)
    return out


def base_of(start):
    return AutoModelForCausalLM.from_pretrained(start / "base")


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """A start by LoRA, and what training has made of it, in one folder."""
    place = tmp_path_factory.mktemp("lora")
    init(str(folder), out=str(place / "start"), rank=8, samples=4, sequence_length=64, solver=Optimal())
    train(place / "start", place / "trained", by=0.3)
    return place


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BIASED])
def test_the_change_is_that_of_stock_peft(folder, tmp_path, name):
    """Of every family: the difference of what PEFT's layers compute before and after."""
    start = start_of(folder, name, tmp_path / "start")
    before = effective_weights(PeftModel.from_pretrained(base_of(start), str(start)))
    after = effective_weights(train(start, tmp_path / "trained", base_of(start)))
    change = TrainedChange.read(tmp_path / "trained")
    layers = change.layers(all_layers(base_of(start)))
    assert layers.keys() == after.keys()
    for layer in layers.values():
        expected = after[layer.name] - before[layer.name]
        assert expected.norm() > 1e-4
        torch.testing.assert_close(change.of(layer, layers, layer.weight), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            change.effective(layer, layers, layer.weight), after[layer.name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", BIASED)
def test_families_with_a_bias_are_refused_by_name(folder, tmp_path, name):
    start = start_of(folder, name, tmp_path / "start")
    train(start, tmp_path / "trained", base_of(start))
    with pytest.raises(ModelError, match=rf"trained biases \({name}\)"):
        merge_full([tmp_path / "trained"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directions_that_adalora_has_cut_off(folder, tmp_path):
    """The file has fewer directions than the configuration, some layers have none, and the scaling is the old one."""
    start = start_of(folder, "adalora", tmp_path / "start")
    model = train(start, tmp_path / "trained", base_of(start))
    names = [name for name, _ in model.named_parameters() if "lora_E" in name]
    keep = {name: [True, False, False, True] for name in names} | {names[0]: [False, True, False, False]}
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): kept for name, kept in keep.items()
    }
    model.save_pretrained(tmp_path / "pruned")
    after = effective_weights(PeftModel.from_pretrained(base_of(start), str(tmp_path / "pruned")))
    change = TrainedChange.read(tmp_path / "pruned", start)
    layers = change.layers(all_layers(base_of(start)))
    for layer in layers.values():
        torch.testing.assert_close(
            change.effective(layer, layers, layer.weight), after[layer.name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["dora", "miss"])
def test_the_merged_model_has_the_change(folder, tmp_path, name):
    start = start_of(folder, name, tmp_path / "start")
    before = effective_weights(PeftModel.from_pretrained(base_of(start), str(start)))
    after = effective_weights(train(start, tmp_path / "trained", base_of(start)))
    merge_full([tmp_path / "trained"], out=tmp_path / "out").show()
    full, merged = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, tmp_path / "out"))
    weights = {key: layer.weight for key, layer in linear_layers(full).items()}
    for key, layer in linear_layers(merged).items():
        torch.testing.assert_close(layer.weight, weights[key] + after[key] - before[key], rtol=1e-4, atol=2e-5)


def test_the_merged_model_is_the_converted_adapter_merged_by_peft(folder, lora, tmp_path):
    convert(lora / "trained", out=tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    expected = stock.merge_and_unload().state_dict()
    merge_full([lora / "trained"], out=tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]  # nothing is left beside them


def test_fused_experts_are_merged_one_by_one(tokenizer, tmp_path):
    make_model("Mixtral").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    targets = {"targets": ["q_proj", "experts"], "save_base": True, "rank_pattern": {"gate_up_proj": 6}}
    init(str(tmp_path / "model"), out=str(tmp_path / "start"), rank=4, samples=4, sequence_length=32, **targets)
    train(tmp_path / "start", tmp_path / "trained", AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "base"))
    convert(tmp_path / "trained", out=tmp_path / "adapter")
    merge_full([tmp_path / "trained"], out=tmp_path / "out")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    expected = PeftModel.from_pretrained(full, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert {name for name in found if "experts" in name} <= set(changed)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_merged_model_has_the_dtype_that_was_asked_for(lora, tmp_path):
    merge_full([lora / "trained"], out=tmp_path / "float32")
    merge_full([lora / "trained"], out=tmp_path / "bfloat16", resources=Resources("bfloat16"))
    full, half = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("float32", "bfloat16")
    )
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        torch.testing.assert_close(tensor.float(), full.state_dict()[name], rtol=2**-7, atol=1e-4)


def test_a_merged_model_is_replaced_on_request_and_nothing_else_is(lora, tmp_path):
    out = tmp_path / "out"
    merge_full([lora / "trained"], out=out)
    with pytest.raises(OutputExistsError, match=r"already holds files.*`overwrite=True`"):
        merge_full([lora / "trained"], out=out)
    merge_full([lora / "trained"], out=out, overwrite=True)
    (out / "merge.json").unlink()
    with pytest.raises(OutputExistsError, match=r"already holds files\. Choose another folder\.$"):
        merge_full([lora / "trained"], out=out, overwrite=True)


def test_the_start_is_found_by_its_hash(lora, tmp_path, monkeypatch):
    assert TrainedChange.read(lora / "trained").before.folder == lora / "start"
    alone = shutil.copytree(lora / "trained", tmp_path / "runs" / "checkpoint-1")
    with pytest.raises(ConfigurationError, match=r"no adapter in the folders around .* has them"):
        TrainedChange.read(alone)
    monkeypatch.chdir(lora)
    assert TrainedChange.read(alone).before.folder.name == "start"


def test_an_untrained_adapter_is_no_change(lora):
    with pytest.raises(ConfigurationError, match="training has changed nothing"):
        TrainedChange.read(lora / "start", lora / "start")


def test_plain_lora_needs_a_word(folder, tmp_path):
    """An adapter that PEFT has started notes nothing, so that the caller has to say that it added nothing."""
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    plain.save_pretrained(tmp_path / "start")
    model = train(tmp_path / "start", tmp_path / "trained", by=0.3)
    with pytest.raises(ConfigurationError, match="does not say which adapter its training started from"):
        TrainedChange.read(tmp_path / "trained")
    merge_full([tmp_path / "trained"], out=tmp_path / "out", initial="zero")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text(encoding="utf-8"))
    for start in ("pissa", "olora", False):
        changed = json.dumps(config | {"init_lora_weights": start})
        (tmp_path / "trained" / "adapter_config.json").write_text(changed, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=rf"init_lora_weights={start!r}, which changes the base or adds"):
            TrainedChange.read(tmp_path / "trained", "zero")


def test_the_model_that_was_trained_is_taken_as_it_is(folder, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(lora)
    model = train(lora / "start", tmp_path / "unused", by=0.3)
    merge_full([model], out=tmp_path / "memory")
    merge_full([lora / "trained"], out=tmp_path / "files")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "files"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        merge_full([AutoModelForCausalLM.from_pretrained(folder)], out=tmp_path / "out")


def test_zero_is_no_start_of_an_adapter_that_notes_another(lora):
    with pytest.raises(ConfigurationError, match="notes that it started from factors with the hash"):
        TrainedChange.read(lora / "trained", "zero")


def test_an_adapter_of_another_model_is_refused(lora, tokenizer, tmp_path):
    other = save_llama(tmp_path / "other", tokenizer, hidden_size=32, intermediate_size=48)
    with pytest.raises(ConfigurationError, match="It is the adapter of another model"):
        merge_full([lora / "trained"], out=tmp_path / "out", model=other)
    fewer = save_llama(tmp_path / "fewer", tokenizer, num_hidden_layers=1)
    with pytest.raises(ConfigurationError, match=r"has no layer for .*layers\.1"):
        merge_full([lora / "trained"], out=tmp_path / "out", model=fewer)
    weights = save_llama(tmp_path / "weights", tokenizer, initializer_range=0.3)  # of the same shapes
    with pytest.raises(ModelError, match="was not made for"):
        merge_full([lora / "trained"], out=tmp_path / "out", model=weights)
    assert not (tmp_path / "out").exists()


def test_modules_that_were_trained_whole_are_merged(folder, tmp_path):
    options = {"rank": 4, "samples": 4, "sequence_length": 64, "solver": Optimal(), "modules_to_save": ["lm_head"]}
    init(str(folder), out=str(tmp_path / "start"), **options)
    trained = train(tmp_path / "start", tmp_path / "trained", by=0.3).get_base_model()
    expected = trained.lm_head.modules_to_save["default"].weight
    tied = AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings
    if tied:
        with pytest.raises(ConfigurationError, match="shares the weights of lm_head"):
            merge_full([tmp_path / "trained"], out=tmp_path / "out")
        return
    merge_full([tmp_path / "trained"], out=tmp_path / "out")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, expected)
    with pytest.raises(ConfigurationError, match="cannot be weighed or added"):
        merge_full([tmp_path / "trained"], out=tmp_path / "half", factors=[0.5])


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_tensors_that_do_not_fit_are_named(lora, tmp_path, damage):
    for name in ("start", "trained"):
        shutil.copytree(lora / name, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        if damage == "missing":
            del tensors[key]
        else:
            tensors[key] = tensors[key][1:].contiguous()
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"up_proj\.lora_B\.weight|hash"):
        merge_full([tmp_path / "trained"], out=tmp_path / "out", initial=tmp_path / "start")
