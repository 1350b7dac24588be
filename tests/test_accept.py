"""Models that are accepted, and those that are refused in one line before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import save_llama
from helpers import compare, evaluate, init
from safetensors.torch import load_file, save_file

from quailora.errors import ConfigurationError, ModelError, OutputExistsError, StorageError
from quailora.evaluation.check import check
from quailora.models.load import empty_model, load_model, resolve_device

SMALL = {"rank": 4, "samples": 2, "sequence_length": 16}


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of the model that a test may spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change(folder, file="config.json", **entries):
    """Change entries of a JSON file; None takes one out."""
    path = folder / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content = {name: value for name, value in (content | entries).items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


def refused(folder, match):
    """Every way to a model ends with the same line."""
    for load in (load_model, empty_model):
        with pytest.raises(ModelError, match=match) as found:
            load(str(folder))
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 600


def test_an_adapter_beside_a_model_is_not_loaded_with_it(folder, tmp_path, tiny_llama):
    init(str(folder), out=str(tmp_path / "clean"), **SMALL)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "clean" / file, folder)
    loaded, expected = load_model(str(folder)).model, load_model(str(tiny_llama)).model
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    init(str(folder), out=str(tmp_path / "second"), **SMALL)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("clean", "second")]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    options = {"windows": 1, "sequence_length": 32}
    plain, found = (evaluate(str(each), **options).results for each in (tiny_llama, folder))
    assert plain["full precision"] == found["full precision"]
    assert check(str(tmp_path / "clean"), base=str(folder)).layers == 14
    refused(tmp_path / "clean", "holds an adapter alone")


def test_a_model_that_comes_with_an_adapter_all_the_same_is_refused(folder, tmp_path, monkeypatch):
    """If transformers should look for adapters elsewhere some day."""
    init(str(folder), out=str(tmp_path / "a"), **SMALL)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "a" / file, folder)
    monkeypatch.setattr("quailora.models.load.NO_ADAPTER", {})
    with pytest.raises(ModelError, match="An adapter was loaded along with"):
        load_model(str(folder))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_adapter_is_not_written_over_a_model(folder, overwrite):
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(OutputExistsError, match="is the folder of a model, and an adapter in it would be"):
        init(str(folder), out=str(folder), overwrite=overwrite, **SMALL)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "torchao"}}}, "torchao"),
        ("config.json", {"compression_config": {"format": "pack-quantized"}}, "an unknown method"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
    ],
)
def test_a_model_that_is_quantized_already_is_refused(folder, tmp_path, file, content, method):
    change(folder, file, **content)
    match = rf"is quantized already \(by {method}\).*Pass the full-precision model as `model`, and this one as `base`"
    refused(folder, match)
    for run in (
        lambda: init(str(folder), out=str(tmp_path / "out"), **SMALL),
        lambda: init(str(folder), out=str(tmp_path / "out"), dry_run=True, **SMALL),
        lambda: evaluate(str(folder)),
        lambda: compare(str(folder), out=str(tmp_path / "out")),
    ):
        with pytest.raises(ModelError, match=match):
            run()


def test_weights_of_8_bits_are_refused_whatever_the_configuration_says(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"stores model.layers.0.mlp.up_proj.weight as I8.*as `base`"):
        load_model(str(folder))


@pytest.fixture
def custom(folder):
    """A model that brings its own code, which leaves a mark when it runs."""
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(folder, model_type="own_model", auto_map=auto)
    mark = f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
    (folder / "configuration_own.py").write_text(
        f"{mark}from transformers import LlamaConfig\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n",
        encoding="utf-8",
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    return folder


def test_code_of_a_model_runs_only_if_it_is_trusted(custom, tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing may be asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = {"out": str(tmp_path / "out"), **SMALL}
    refused(
        custom, "brings Python code of its own. If you have read that code and trust it, pass `trust_remote_code=True`"
    )
    with pytest.raises(ModelError, match="pass `trust_remote_code=True`"):
        init(str(custom), dry_run=True, **arguments)
    assert not (custom / "ran").exists()
    assert init(str(custom), dry_run=True, trust_remote_code=True, **arguments)
    init(str(custom), trust_remote_code=True, **arguments)
    init(str(tiny_llama), **{**arguments, "out": str(tmp_path / "plain")})
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "plain")]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert evaluate(str(custom), trust_remote_code=True, windows=1, sequence_length=32).results
    assert check(str(tmp_path / "out"), base=str(custom), trust_remote_code=True).layers == 14
    assert (custom / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_does_not_run(custom, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing may be asked"))
    change(custom, model_type="llama")
    change(custom, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    (custom / "tokenization_own.py").write_text("raise SystemExit\n", encoding="utf-8")
    assert load_model(str(custom)).model.config.model_type == "llama"
    assert not (custom / "ran").exists()


def test_encoder_decoders_are_refused(folder):
    change(folder, model_type="t5", is_encoder_decoder=True)
    refused(folder, r"Expected a causal language model, but .* is an encoder-decoder \(t5\), which is not supported")
    change(folder, model_type="vit", is_encoder_decoder=None)
    refused(folder, "is a model of the kind 'vit', which is not supported")


def test_damaged_configurations_are_refused(folder):
    change(folder, model_type=None)
    refused(folder, r"Cannot load the model of .*model_type")
    change(folder, model_type="no-such-kind")
    refused(folder, r"Cannot load the model of .*no-such-kind")
    (folder / "config.json").write_text("[1, 2]", encoding="utf-8")
    refused(folder, r"Expected a JSON object in .*config.json, got list")
    refused("no such folder", "got 'no such folder': there is no such folder, and the hub has no .*Repo id must")
    refused(
        "no-such/model", "there is no such folder, and the hub has no model of this name, or it cannot be reached.$"
    )


def test_a_model_without_its_tokenizer_is_refused(tmp_path, tokenizer):
    folder = save_llama(tmp_path / "it's a model, übrigens", tokenizer)
    assert load_model(str(folder)).tokenizer
    for file in folder.glob("tok*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"Cannot load the tokenizer of .*copy them from the original model"):
        load_model(str(folder))


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ConfigurationError, match=r"Expected a CUDA device, and PyTorch finds none"):
        load_model("no such model, and nobody looks", device="cuda")
    with pytest.raises(ConfigurationError, match=r"Expected the device auto, cpu or cuda, got 'mps'"):
        resolve_device("mps")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QUAILORA_CACHE", str(tmp_path / "cache" / "below"))
    with pytest.raises(StorageError, match=r"cannot be written \(Not a directory\). Set QUAILORA_CACHE"):
        load_model(str(tmp_path / "model.gguf"))
