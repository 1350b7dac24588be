"""What training changed, on the full-precision model: `W + s (B A - B0 A0)` by stock PEFT."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import make_model
from helpers import evaluate, init
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quailora import Optimal, Uniform
from quailora.adapters.convert import change, convert
from quailora.core.objective import Factors
from quailora.errors import ConfigurationError, ModelError, OutputExistsError
from quailora.evaluation.check import check
from quailora.models.layers import linear_layers

FAST = {"solver": Optimal(), "samples": 4, "sequence_length": 64}
FUSED = FAST | {"sequence_length": 32, "targets": ["q_proj", "experts"], "save_base": True}
SCALINGS = {
    "plain": {"rank": 4},
    "alpha": {"rank": 4, "alpha": 11.0},
    "rslora": {"rank": 4, "alpha": 7.0, "rslora": True},
    "patterns": {
        "rank": 4,
        "rank_pattern": {"q_proj": 6, "mlp.down_proj": 2},
        "alpha_pattern": {"k_proj": 3.0},
        "rslora": True,
    },
}


def train(folder, initial):
    """Change every factor of an adapter by stock PEFT, and save it as training does."""
    base = AutoModelForCausalLM.from_pretrained(initial.parent / "model")
    model = PeftModel.from_pretrained(base, str(initial), is_trainable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return deltas(model)


def forget(folder):
    """Remove what a folder says of the origin of its adapter."""
    (folder / "quailora.json").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}), encoding="utf-8")


def deltas(model):
    """What an adapter adds to each weight."""
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {
        name: each.get_delta_weight("default") for name, each in modules.items() if hasattr(each, "get_delta_weight")
    }


@pytest.fixture
def original(tiny_llama, tmp_path):
    (tmp_path / "model").symlink_to(tiny_llama)
    return tmp_path / "model"


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_round_trip(scaling, original, tmp_path):
    init(str(original), out=str(tmp_path / "initial"), **FAST, **scaling)
    before = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(original), str(tmp_path / "initial"))
    started = deltas(before)
    ended = train(tmp_path / "trained", tmp_path / "initial")
    convert(str(tmp_path / "trained"), initial=str(tmp_path / "initial"), out=str(tmp_path / "out")).show()
    full = AutoModelForCausalLM.from_pretrained(original)
    weights = {name: layer.weight.clone() for name, layer in linear_layers(full).items()}
    merged = PeftModel.from_pretrained(full, str(tmp_path / "out")).merge_and_unload()
    for name, layer in linear_layers(merged).items():
        torch.testing.assert_close(layer.weight, weights[name] + ended[name] - started[name], rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(original)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks for them among modules only
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_round_trip_of_fused_experts(family, tokenizer, tmp_path):
    """Two parameters of one module, of different ranks."""
    make_model(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    init(str(tmp_path / "model"), out=str(tmp_path / "a"), rank=4, rank_pattern={"gate_up_proj": 6}, **FUSED)
    before = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path / "a"))
    started = deltas(before)
    ended = train(tmp_path / "trained", tmp_path / "a")
    convert(str(tmp_path / "trained"), initial=str(tmp_path / "a"), out=str(tmp_path / "out"))
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = deltas(PeftModel.from_pretrained(full, str(tmp_path / "out")))
    assert found.keys() == started.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, ended[name] - started[name], rtol=0, atol=1e-6)


def test_an_untrained_adapter_changes_nothing(original, tmp_path):
    init(str(original), out=str(tmp_path / "initial"), rank=4, **FAST)
    convert(str(tmp_path / "initial"), initial=str(tmp_path / "initial"), out=str(tmp_path / "out"))
    full = AutoModelForCausalLM.from_pretrained(original)
    ids = torch.arange(64)[None]
    expected = full(ids).logits
    found = PeftModel.from_pretrained(full, str(tmp_path / "out"))(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_training_has_started_from_the_initial_adapter(original, tmp_path):
    """By the hash that training keeps; without one, by how far the factors are apart."""
    init(str(original), out=str(tmp_path / "initial"), rank=4, **FAST)
    init(str(original), out=str(tmp_path / "other"), rank=4, quantizer=Uniform(bits=2), **FAST)
    train(tmp_path / "trained", tmp_path / "initial")
    with pytest.raises(ConfigurationError, match=r"was not trained from .*other: it notes that training started from"):
        convert(tmp_path / "trained", initial=tmp_path / "other", out=tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"was not trained from .*trained: it notes"):
        convert(tmp_path / "trained", initial=tmp_path / "trained", out=tmp_path / "out")
    forget(tmp_path / "trained")
    with pytest.raises(
        ConfigurationError, match=r"was hardly trained from .*other: only [0-9]+% of the rows of lora_A"
    ):
        convert(tmp_path / "trained", initial=tmp_path / "other", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["auto_mapping"] is None  # it belongs on another base


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_diverged_training_is_refused(number, original, tmp_path):
    init(str(original), out=str(tmp_path / "initial"), rank=4, **FAST)
    trained = shutil.copytree(tmp_path / "initial", tmp_path / "trained")
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = number
    save_file(tensors, trained / "adapter_model.safetensors", {"format": "pt"})
    told = r"1 NaN or infinite entries of 384 in base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    with pytest.raises(ModelError, match=told):
        convert(trained, initial=tmp_path / "initial", out=tmp_path / "out")
    with pytest.raises(ModelError, match=told):
        evaluate(str(original), adapter=trained)
    with pytest.raises(ModelError, match=told):
        check(trained, base=str(original))


def test_factors_that_are_no_numbers_are_refused(original, tmp_path):
    """PEFT would take a file of truth values for ones and zeros."""
    init(str(original), out=str(tmp_path / "a"), rank=4, **FAST)
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file(load_file(file) | {key: load_file(file)[key].bool()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"Expected floating-point numbers in .*, got torch.bool in {key}"):
        evaluate(str(original), adapter=tmp_path / "a")


def test_other_kinds_of_adapters_are_refused_by_name(original, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(original)
    plain = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for told, config in {
        "linear in its tensors, such as .*, got dora": LoraConfig(r=4, use_dora=True, **plain),
        "linear in its tensors, such as .*, got ia3": IA3Config(feedforward_modules=[], **plain),
        "got .*q_proj.lora_B.bias": LoraConfig(r=4, **plain),
    }.items():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model = get_peft_model(base, config)
        model.save_pretrained(folder)
        base = model.unload()
        if "bias" in told:
            tensors = load_file(folder / "adapter_model.safetensors")
            tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"] = torch.zeros(64)
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=told):
            convert(folder, initial=folder, out=tmp_path / "out", model="me/original")


def test_experts_by_hand(generator):
    """One pair for all experts: rows of `lora_A` expert after expert, columns of `lora_B` interleaved."""
    trained, before = (
        Factors(torch.randn(7, 6, generator=generator), torch.randn(6, 5, generator=generator)) for _ in "ab"
    )
    found = change(trained, before, rank=2)

    def of(expert, pair, rank):
        return pair.lora_B.reshape(7, rank, 3)[:, :, expert] @ pair.lora_A[rank * expert : rank * (expert + 1)]

    for expert in range(3):
        expected = of(expert, trained, 2) - of(expert, before, 2)
        torch.testing.assert_close(of(expert, found, 4), expected)


def test_bad_pairs_are_refused(original, tmp_path):
    init(str(original), out=str(tmp_path / "a"), rank=4, **FAST)
    init(str(original), out=str(tmp_path / "b"), rank=2, **FAST)
    init(str(original), out=str(tmp_path / "c"), rank=4, targets=["q_proj"], **FAST)
    arguments = {"initial": str(tmp_path / "a"), "out": str(tmp_path / "out")}
    with pytest.raises(ConfigurationError, match=r"was not trained from .*: r is 2 in one and 4 in the other"):
        convert(str(tmp_path / "b"), **arguments)
    with pytest.raises(ConfigurationError, match="their layers or shapes differ"):
        convert(str(tmp_path / "c"), **arguments)
    with pytest.raises(ModelError, match=r"Expected an adapter folder with adapter_config\.json"):
        convert(str(original), **arguments)
    assert not (tmp_path / "out").exists()
    forget(tmp_path / "a")
    with pytest.raises(
        ConfigurationError, match="does not say which full-precision model it was made from, so name it with `model`"
    ):
        convert(str(tmp_path / "a"), **arguments)
    convert(str(tmp_path / "a"), model="me/original", **arguments)
    with pytest.raises(OutputExistsError, match=r"out.* already"):
        convert(str(tmp_path / "a"), model="me/original", **arguments)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 28
