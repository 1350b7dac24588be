"""The function for whole models: what it takes and gives, against the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import init
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import quailora
from quailora import GPTQ, NF4, Calibration, LoraScaling, Optimal, Output, TextSource, Uniform
from quailora.adapters.files import stored_parameters
from quailora.calibration.tokens import CalibrationTokens
from quailora.cli.main import main
from quailora.errors import CalibrationError, ConfigurationError, ModelError, OutputExistsError
from quailora.evaluation.check import check
from quailora.models.load import load_model

SETTINGS = {"rank": 4, "samples": 4, "sequence_length": 32}
CALIBRATION = Calibration(samples=4, sequence_length=32)
SCALING = LoraScaling(4)


@pytest.fixture(scope="module")
def by_command(tiny_llama, tmp_path_factory):
    """An adapter of the command line, to compare with."""
    folder = tmp_path_factory.mktemp("command") / "out"
    init(tiny_llama, out=folder, recipe="quailora", **SETTINGS)
    return load_file(folder / "adapter_model.safetensors")


def assert_same(result, expected, scaling=SCALING):
    found = {name: stored_parameters(name, correction, scaling) for name, correction in result.corrections.items()}
    assert len(found) == len(expected) // 2
    for name, parameters in found.items():
        for end, tensor in parameters.items():
            assert torch.equal(tensor, expected[f"base_model.model.{name}.{end}"])


def windows_of(model):
    return CALIBRATION.windows(load_model(str(model)).tokenizer)


@pytest.mark.parametrize("kind", ["name", "path", "object"])
@pytest.mark.parametrize("given", ["text", "batches", "padded"])
def test_every_form_of_model_and_calibration_gives_the_same_factors(tiny_llama, by_command, kind, given):
    """Bit for bit in float32: batches are cut into sequences, and put together again as those of a text are."""
    forms = {"name": str, "path": Path, "object": lambda folder: load_model(str(folder)).model}
    model = forms[kind](tiny_llama)
    windows = windows_of(tiny_llama)
    batches = {
        "text": CALIBRATION,
        "batches": [{"input_ids": part} for part in windows.split(3)],
        "padded": [padded(part, left=index % 2) for index, part in enumerate(windows.split(1))],
    }
    result = quailora.initialize_model(model, "quailora", batches[given], scaling=SCALING)
    assert_same(result, by_command)
    assert result.folder is None
    assert result.report["mean_error_share"]["error"] < 1


def padded(ids, *, left):
    pad = torch.zeros(len(ids), 5, dtype=ids.dtype)
    parts = (pad, ids) if left else (ids, pad)
    masks = (pad, torch.ones_like(ids)) if left else (torch.ones_like(ids), pad)
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}


def test_tokens_without_a_label_do_not_count(tiny_llama):
    """Statistics are those of the labelled tokens, which see the others before them."""
    loaded = load_model(str(tiny_llama))
    windows = windows_of(tiny_llama)
    labels = windows.clone()
    labels[:, :12] = -100
    batches = [{"input_ids": windows, "labels": labels}]
    result = quailora.initialize_model(loaded.model, "quailora", batches, scaling=SCALING)
    assert {layer["tokens"] for layer in result.report["layers"]} == {4 * 20}
    everything = quailora.initialize_model(loaded.model, "quailora", [{"input_ids": windows}], scaling=SCALING)
    assert result.report["mean_error_share"] != everything.report["mean_error_share"]
    seen = []
    layer = loaded.model.model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        loaded.model(windows)
    hook.remove()
    kept = seen[0][labels != -100].double()
    name = "model.layers.0.mlp.down_proj"
    error = layer.weight.double() - NF4().quantize(layer.weight).dequantize().double()
    expected = (error @ (kept.T @ kept / len(kept)) @ error.T).trace()
    record = next(layer for layer in result.report["layers"] if layer["name"] == name)
    assert record["error_none"] == pytest.approx(expected.item(), rel=1e-2)  # bfloat16 products where the CPU has them


def test_the_result_is_written_or_loaded_into_a_peft_model(tiny_llama, tmp_path):
    scaling = LoraScaling(4, alpha=12.0, rslora=True)
    result = quailora.initialize_model(str(tiny_llama), "qera-exact", CALIBRATION, scaling=scaling)
    assert len(repr(result)) < 200
    shown = result._repr_markdown_()  # which a notebook shows
    assert "an adapter for 14 layers, on a base of 4.1" in shown
    assert shown.count("\n|") == 2 + 4
    folder = result.save(tmp_path / "saved")
    with pytest.raises(OutputExistsError, match="already holds a result"):
        result.save(folder)
    assert json.loads((folder / "quailora.json").read_text(encoding="utf-8"))["recipe"] == "qera-exact"
    model = load_model(str(tiny_llama)).model
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    result.load_into(wrapped)
    stored = load_file(folder / "adapter_model.safetensors")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, stored[name.replace(".default", "")])
    other = get_peft_model(load_model(str(tiny_llama)).model, LoraConfig(r=3, target_modules="all-linear"))
    with pytest.raises(ValueError, match="Expected tensors of shapes"):
        result.load_into(other)


def test_what_is_asked_for_twice_or_not_at_all_is_refused(tiny_llama):
    method = quailora.RECIPES["quailora"].method(NF4(), SCALING)
    with pytest.raises(ConfigurationError, match="has a scaling, a base and a family of its own"):
        quailora.initialize_model(str(tiny_llama), method, CALIBRATION, scaling=SCALING)
    with pytest.raises(ConfigurationError, match="has a scaling, a base and a family of its own"):
        quailora.initialize_model(str(tiny_llama), method, CALIBRATION, base=Uniform())
    with pytest.raises(ModelError, match="Expected a causal language model of transformers, its name or its folder"):
        quailora.initialize_model(torch.nn.Linear(3, 3), method, CALIBRATION)
    with pytest.raises(ConfigurationError, match="Unknown recipe 'nothing'"):
        quailora.initialize_model(str(tiny_llama), "nothing", CALIBRATION)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got none that has a token"),
        ([{"tokens": torch.ones(1, 4)}], r"matrix of token ids as input_ids, got a mapping with tokens as batch 0"),
        ([{"input_ids": torch.ones(1, 4)}], "matrix of token ids"),
        ([{"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 5)}], r"shape \(2, 4\)"),
        (
            [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[1, 0, 1, 1]])}],
            "mask of row 0 of batch 0 has zeros between ones",
        ),
        ([{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}], "got none that has a token"),
    ],
)
def test_batches_of_another_form_are_refused(batches, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationTokens.of_batches(batches)


@pytest.mark.parametrize("base", [NF4(), "save"])
def test_load_gives_the_right_base_with_its_adapter(tiny_llama, tmp_path, base, capsys):
    quantizer = NF4() if base != "save" else Uniform(bits=4)
    output = Output(tmp_path / "out", save_base=base == "save", base_format="dequantized")
    quailora.initialize_model(str(tiny_llama), "qera-exact", CALIBRATION, scaling=SCALING, base=quantizer, out=output)
    wrapped = quailora.load(tmp_path / "out", trainable=True)
    assert isinstance(wrapped, PeftModel)
    assert any(parameter.requires_grad for parameter in wrapped.parameters())
    full = load_model(str(tiny_llama)).model
    ids = windows_of(tiny_llama)[:2]
    wrapped.train()  # bitsandbytes fails on 96 columns otherwise; nothing here depends on it
    expected, found = full(ids).logits, wrapped(ids).logits
    with wrapped.disable_adapter():
        alone = wrapped(ids).logits
    assert (found - expected).norm() < 0.9 * (alone - expected).norm()
    place = tmp_path / "out" / "base" if base == "save" else tiny_llama
    assert main(["check", str(tmp_path / "out"), "--base", str(place)]) == 0
    with pytest.raises(ConfigurationError, match="Leave out quantization_config"):
        quailora.load(tmp_path / "out", quantization_config={})


def test_load_refuses_another_base(tiny_llama, tmp_path):
    folder = tmp_path / "out"
    quailora.initialize_model(str(tiny_llama), "qera-exact", CALIBRATION, scaling=SCALING, out=folder)
    for file in ("adapter_config.json", "quailora.json"):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        origin = content["origin"] if "origin" in content else content["auto_mapping"]["quailora"]
        origin["quantizer"] = {"class_path": "fp4", "init_args": {}}
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=r"was not made for .*14 of 14 layers have other codes or scales"):
        quailora.load(folder)


def test_methods_of_ones_own(tiny_llama):
    initializer = quailora.Initializer(Uniform(bits=3), Optimal(), weighting=quailora.ShrunkWeighting(0.4))
    method = quailora.Method(initializer, SCALING)
    text = Calibration(TextSource(None), samples=4, sequence_length=32)
    result = quailora.initialize_model(str(tiny_llama), method, text, targets=["down_proj"])
    assert [layer["name"].rpartition(".")[2] for layer in result.report["layers"]] == 2 * ["down_proj"]


@pytest.mark.parametrize("base", ["nf4", "gptq", "there"])
def test_layers_without_an_adapter_are_compared(tiny_llama, tmp_path, base):
    """Where the quantized network is seen, which has them, and the base is written; others are not noted."""
    options = {"recipe": "best-joint" if base != "there" else "asymmetric", "targets": ["q_proj", "down_proj"]}
    options |= {"samples": 16, "sequence_length": 32, "rank": 4}
    place = tmp_path / "adapter/base"
    if base == "there":
        init(str(tiny_llama), out=str(tmp_path / "made"), save_base=True, quantizer=GPTQ(4, 32), **options)
        place = tmp_path / "made/base"
        options |= {"quantizer": None, "base": str(place)}
    else:
        options |= {"quantizer": NF4() if base == "nf4" else Uniform(3, 32)}
    init(str(tiny_llama), out=str(tmp_path / "adapter"), **options)
    assert check(tmp_path / "adapter", base=place).layers == (4 if base == "there" else 14)
    if base == "nf4":  # which transformers loads by itself
        quailora.load(tmp_path / "adapter")
