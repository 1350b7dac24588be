"""Adapters of every family: written by a run, loaded by stock PEFT on stock bases, and resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import save_llama
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    C3AConfig,
    FourierFTConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    WaveFTConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from quailora import FAMILIES, NF4, Calibration, Int8, LoraScaling, Output, Uniform, initialize, initialize_model
from quailora.adapters.convert import convert
from quailora.adapters.files import stored_parameters
from quailora.adapters.tuned import adapter_of, tensors_of
from quailora.calibration.sources import TextCalibration
from quailora.errors import ConfigurationError, ModelError, TargetError
from quailora.evaluation.scores import Corrected, biases_of, measure
from quailora.methods.distillation import Distillation
from quailora.methods.recipes import find_recipe
from quailora.models.layers import linear_layers
from quailora.models.weights import biased, replaced
from quailora.pipeline.checkpoint import open_checkpoint

CALIBRATION = Calibration(samples=4, sequence_length=64)
IDS = torch.arange(96).view(2, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("families") / "model", tokenizer)


def made(folder, name, out=None, recipe="quailora", base=None):
    scaling = None if FAMILIES[name].default_rank is None else LoraScaling(4)
    return initialize_model(
        str(folder), recipe, CALIBRATION, family=sized(name), scaling=scaling, base=base or NF4(), out=out
    )


SIZES = {"c3a": {"block_size": 32}, "fourierft": {"n_frequency": 200}, "waveft": {"n_frequency": 200}}
SIZES["road"] = {"group_size": 16}


def sized(name):
    """Return a family of a size that the tiny model has room for."""
    return FAMILIES[name](**SIZES.get(name, {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_peft_computes_what_was_fitted(folder, tmp_path, name, base):
    """Logits on a base of bitsandbytes, against the model with weights `Q + C` and biases."""
    if base not in FAMILIES[name].bases:
        pytest.skip(f"stock PEFT does not compute {name} on {base}")
    quantizer = NF4() if base == "nf4" else Int8()
    config = BitsAndBytesConfig(**quantizer.stock_config())
    result = made(folder, name, tmp_path / "out", base=quantizer)
    share = result.report["mean_error_share"]
    assert share["error"] <= share["error_uncalibrated"] * (1 + 1e-4)
    assert share["error"] < 1
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out").train()  # in evaluation inputs are rounded, too
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = linear_layers(plain)
    weights = Corrected(
        {layer: stored.dequantized for layer, stored in quantized(result, layers).items()}, result.corrections
    )
    with torch.no_grad(), replaced(layers, weights), biased(layers, biases_of(weights)):
        expected = plain(IDS).logits
    with torch.no_grad():
        found = adapted(IDS).logits
    size = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)


def quantized(result, layers):
    quantizer = result.output.plan.method.quantizer
    from quailora.pipeline.store import StoredLayer

    return {
        name: StoredLayer(dequantized=quantizer.quantize(layers[name].weight).dequantize())
        for name in result.corrections
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_memory_gets_the_same(folder, name):
    """`initialize` on whatever adapter PEFT has put in, against a run that writes files."""
    family, rank = sized(name), 4
    if "nf4" not in family.bases:
        pytest.skip(f"stock PEFT does not compute {name} on nf4")
    scaling = LoraScaling(rank, 8.0 if family.scales else None)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[family.peft_type](
        **family.config(scaling.as_config()), target_modules=targets, task_type="CAUSAL_LM"
    )
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4().stock_config()), dtype=torch.float32
    )
    model = get_peft_model(stock, config)
    share = initialize(model, [{"input_ids": IDS}])["mean_error_share"]
    assert share["error"] <= share["error_uncalibrated"] * (1 + 1e-4) < 1 + 2e-4
    batches = [{"input_ids": IDS}]
    wanted = initialize_model(str(folder), "quailora", batches, family=family, scaling=scaling, targets=targets)
    layers, _, found = adapter_of(model, "default")
    assert (found.name if found else "lora") == name
    assert layers.keys() == wanted.corrections.keys()
    for layer, correction in wanted.corrections.items():
        expected = stored_parameters(layer, correction, scaling)
        for end, tensor in tensors_of(layers[layer]).items():
            torch.testing.assert_close(tensor.detach(), expected[end], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_ranks_and_alphas_of_a_model_in_memory(folder):
    """The tensors are those of a run with the same ranks and alphas, and the scales are those of PEFT."""
    scaling = LoraScaling(4, 8.0, rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 3.0})
    targets, family = ["q_proj", "v_proj", "down_proj"], FAMILIES["dora"]()
    config = PEFT_TYPE_TO_CONFIG_MAPPING[family.peft_type](
        **family.config(scaling.as_config()), target_modules=targets, task_type="CAUSAL_LM"
    )
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4().stock_config()), dtype=torch.float32
    )
    model = get_peft_model(stock, config)
    initialize(model, [{"input_ids": IDS}])
    wanted = initialize_model(
        str(folder), "quailora", [{"input_ids": IDS}], family=family, scaling=scaling, targets=targets
    )
    layers, found, _ = adapter_of(model, "default")
    assert {found.rank_of(layer) for layer in layers} == {2, 4}
    for layer, correction in wanted.corrections.items():
        expected = stored_parameters(layer, correction, scaling)
        for end, tensor in tensors_of(layers[layer]).items():
            torch.testing.assert_close(tensor.detach(), expected[end], rtol=1e-3, atol=1e-5)
        assert layers[layer].scale == layers[layer].module.scaling["default"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        C3AConfig(block_size=32),
        FourierFTConfig(n_frequency=200),
        WaveFTConfig(n_frequency=200),
        LoHaConfig(r=4),
        LoKrConfig(r=4, init_weights="lycoris"),
        HiraConfig(r=4, init_weights="gaussian"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_starts_of_peft_are_replaced_whatever_they_are(folder, config):
    """Those of C3A and FourierFT are random by default."""
    config.target_modules = ["q_proj", "down_proj"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    report = initialize(model, [{"input_ids": IDS}], weights=str(folder), quantizer=NF4())
    assert report["mean_error_share"]["error"] < 1


def test_forms_and_starts_that_are_not_known_are_refused(folder):
    def adapted(config):
        return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)

    with pytest.raises(ConfigurationError, match="miss has init_weights=True and this adapter 'bat'"):
        initialize(adapted(MissConfig(r=4, init_weights="bat", target_modules=["q_proj"])), [{"input_ids": IDS}])
    changed = LoraConfig(r=4, use_dora=True, init_lora_weights="olora", target_modules=["q_proj"])
    with pytest.raises(ConfigurationError, match="got init_lora_weights='olora'"):
        initialize(adapted(changed), [{"input_ids": IDS}])


@pytest.mark.parametrize("name", ["adalora", "loha"])
def test_rank_stabilised_scaling_is_refused_where_peft_has_none(folder, name):
    with pytest.raises(ConfigurationError, match=f"no rank-stabilised scaling for {name}. Leave out rslora"):
        initialize_model(str(folder), "quailora", CALIBRATION, family=name, scaling=LoraScaling(4, rslora=True))


def test_a_run_names_its_family(folder, tmp_path):
    result = made(folder, "dora", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["family"]["class_path"] == "dora"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_dora"] is True
    assert config["r"] == 4
    assert result.corrections.keys() == {layer["name"] for layer in report["layers"]}
    assert all(layer["error_optimal"] == layer["error"] for layer in report["layers"])


def test_what_a_family_cannot_carry_is_refused(folder):
    with pytest.raises(ConfigurationError, match="multiplies the quantized weight"):
        initialize_model(str(folder), "best-joint", CALIBRATION, family="dora")
    with pytest.raises(ConfigurationError, match="has a bias, which needs full inputs, got asymmetric"):
        initialize_model(str(folder), "best", CALIBRATION, family="beft")
    with pytest.raises(ConfigurationError, match="PEFT has no lora_alpha for beft"):
        initialize_model(str(folder), "quailora", CALIBRATION, family="beft", scaling=LoraScaling(4, alpha=8.0))
    with pytest.raises(ConfigurationError, match="which works with LoRA only, got adalora"):
        initialize_model(str(folder), "lq-lora", CALIBRATION, family="adalora")
    with pytest.raises(ConfigurationError, match="no start for 'hra': stock PEFT takes the integer codes"):
        initialize_model(str(folder), "quailora", CALIBRATION, family="hra")
    with pytest.raises(ConfigurationError, match="Did you mean adalora"):
        initialize_model(str(folder), "quailora", CALIBRATION, family="adalra")
    with pytest.raises(TargetError, match="rank"):
        initialize_model(str(folder), "quailora", CALIBRATION, family="adalora", scaling=LoraScaling(400))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, cls in FAMILIES.items() if cls.linear])
def test_what_training_adds_to_a_linear_family_is_converted(folder, tmp_path, name):
    """On the full-precision model: what the trained adapter adds, less what its start does."""
    made(folder, name, tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", initial=tmp_path / "start", out=tmp_path / "out")
    layer = "model.layers.1.mlp.down_proj"
    changes = []
    for adapter in ("start", "trained", "out"):
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / adapter
        )
        module = adapted.get_base_model().get_submodule(layer)
        inputs = torch.linspace(-1, 1, 5 * 128).view(5, 128)
        changes.append(module(inputs) - module.get_base_layer()(inputs))
    torch.testing.assert_close(changes[2], changes[1] - changes[0], rtol=1e-3, atol=1e-4)
    made(folder, name, tmp_path / "other", recipe="lorc")
    with pytest.raises(ConfigurationError, match="was not trained from"):
        convert(tmp_path / "trained", initial=tmp_path / "other", out=tmp_path / "none")


@pytest.mark.filterwarnings("ignore")
def test_other_families_are_not_converted(folder, tmp_path):
    made(folder, "ia3", tmp_path / "start")
    with pytest.raises(ModelError, match="or one whose change is linear in its tensors"):
        convert(tmp_path / "start", initial=tmp_path / "start", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["dora", "shira", "beft"])
def test_a_killed_run_keeps_adapters_of_any_family(folder, tmp_path, name):
    """Tensors of any kind, indices among them, and the family itself, with its fields."""
    store = open_checkpoint(tmp_path, {"run": "this"}, fresh=False)
    result = made(folder, name)
    for layer, stored in result.output.finished.items():
        store.save(layer, stored)
        again = store.load(layer)
        assert again.correction.family == stored.correction.family
        assert again.correction.shape == stored.correction.shape
        assert again.record == stored.record
        for end, tensor in stored.correction.parameters.items():
            torch.testing.assert_close(again.correction.parameters[end], tensor, rtol=0, atol=0)


def test_distillation_trains_a_family(folder):
    """Every tensor but indices; the predictions come closer to those of full precision on the text itself."""
    distillation = Distillation(steps=20, batch=2, sequence_length=64, learning_rate=3e-3)
    source = Calibration(samples=8, sequence_length=64)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = linear_layers(plain)
    base = {name: Uniform(bits=2).quantize(layer.weight).dequantize() for name, layer in layers.items()}
    windows = distillation.windows(TextCalibration(source), AutoTokenizer.from_pretrained(folder))
    for name in ("dora", "shira", "lora_bias"):
        recipe = replace(find_recipe("lorc"), distillation=distillation)
        starts, ends = (
            initialize_model(
                str(folder), one, source, family=name, scaling=LoraScaling(4), base=Uniform(bits=2)
            ).corrections
            for one in (find_recipe("lorc"), recipe)
        )
        changed = {
            end
            for layer, start in starts.items()
            for end, tensor in start.parameters.items()
            if not torch.equal(tensor, ends[layer].parameters[end])
        }
        assert changed == set(starts[next(iter(starts))].parameters) - FAMILIES[name].untrained
        variants = {"start": Corrected(base, starts), "end": Corrected(base, ends)}
        scores = measure(plain, layers, variants, windows[:8])
        assert scores["end"].divergence < 0.97 * scores["start"].divergence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "miss", "shira"])
def test_adapters_in_bfloat16(folder, tmp_path, name):
    """Half of the bytes, the same function to the rounding of the file; PEFT makes float32 of it."""
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        initialize_model(
            str(folder),
            "quailora",
            CALIBRATION,
            family=name,
            scaling=LoraScaling(4),
            out=Output(out, factors_dtype=dtype),
        )
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, out)
        assert {part.dtype for part in model.parameters()} == {torch.float32}
        with torch.no_grad():
            outputs[dtype] = model(IDS).logits
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "bfloat16" / "adapter_model.safetensors").values()}
    assert kinds - {torch.int32} == {torch.bfloat16}
    sizes = [(tmp_path / dtype / "adapter_model.safetensors").stat().st_size for dtype in outputs]
    assert name == "shira" or sizes[1] < 0.6 * sizes[0]
    size = outputs["float32"].abs().max().item()
    torch.testing.assert_close(outputs["bfloat16"], outputs["float32"], rtol=0, atol=1e-3 * size)
    out = Output(tmp_path / "dora", factors_dtype="bfloat16")
    with pytest.raises(ConfigurationError, match="rounding its numbers to bfloat16 would move the whole output"):
        initialize_model(str(folder), "quailora", CALIBRATION, family="dora", out=out)
