"""Quantized layers in memory are read as they compute."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import save_llama
from live import KINDS, PackedLinear, hqq_layer, live_model, own_weight, packed_layer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quailora import FP4, NF4, Int8, Uniform
from quailora.bases.live import LiveBase
from quailora.bases.live_weights import kind_of, live_weight
from quailora.errors import ModelError, NumericalWarning
from quailora.models.layers import linear_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("live") / "model", tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_base_has_the_weights_of_its_layers(kind, folder):
    model = live_model(kind, folder)
    base = LiveBase(model)
    assert base.title == str(folder)
    assert base.layers == linear_layers(AutoModelForCausalLM.from_pretrained(folder)).keys()
    for name in base.layers:
        found, expected = base.weight(name, torch.float32), own_weight(kind, model.get_submodule(name))
        assert found.shape == tuple(expected.shape)
        torch.testing.assert_close(found.dequantize(), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_layers_that_have_run_leaves_them_as_they_are(kind, folder):
    model, ids = live_model(kind, folder), torch.arange(32)[None]
    expected = {name: LiveBase(model).weight(name, torch.float32) for name in LiveBase(model).layers}
    with torch.no_grad():
        before = model.eval()(ids).logits
    rounded = kind == "bitsandbytes-4" and model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    told = pytest.warns(NumericalWarning, match="do not train this model") if rounded else nullcontext()
    with told:
        found = {name: LiveBase(model).weight(name, torch.float32) for name in LiveBase(model).layers}
    for name, weight in expected.items():
        assert found[name].code_digest == weight.code_digest
        assert rounded or found[name].digest == weight.digest
        torch.testing.assert_close(found[name].dequantize(), weight.dequantize(), rtol=0.02, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bitsandbytes-4", "hqq", "torchao"])
def test_layers_inside_an_adapter_keep_their_names(kind, folder):
    plain = LiveBase(live_model(kind, folder))
    targets = ["q_proj", "down_proj"]
    adapted = LiveBase(get_peft_model(live_model(kind, folder), LoraConfig(target_modules=targets)))
    assert adapted.layers == plain.layers
    assert adapted.title == plain.title
    for name in plain.layers:
        assert adapted.weight(name, torch.float32).digest == plain.weight(name, torch.float32).digest


@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_are_read_in_both_versions(version, generator):
    weight = torch.randn(64, 96, generator=generator)
    layer = packed_layer(weight, version)
    assert kind_of(layer) == "gptq"
    found = live_weight(layer, torch.bfloat16)
    assert found.dequantize().dtype == torch.bfloat16
    torch.testing.assert_close(found.dequantize(), layer.dequantize_weight().T.bfloat16(), rtol=0, atol=0)


def test_a_model_in_full_precision_has_no_live_layers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert LiveBase(model).layers == frozenset()
    assert live_weight(model.model.layers[0].mlp.up_proj, torch.float32) is None
    with pytest.raises(ModelError, match="Expected a quantized layer lm_head"):
        LiveBase(model).weight("lm_head", torch.float32)


def rearranged(layer):
    layer.qweight.copy_(layer.qweight.flip(0))
    weight = layer.dequantize_weight().flip(0)
    layer.dequantize_weight = lambda: weight
    return layer


def without_a_kernel(layer):
    layer.forward = lambda inputs: inputs.no_such_kernel()
    return layer


def after_its_first_run(layer):
    layer.qweight = layer.qweight.view(torch.uint8)
    return layer


@pytest.mark.parametrize("damage", [rearranged, without_a_kernel, after_its_first_run])
def test_layers_whose_kernel_rearranged_their_codes_are_refused(damage, generator):
    layer = damage(packed_layer(torch.randn(64, 96, generator=generator)))
    with pytest.raises(ModelError, match=r"kernel seems to have rearranged them.*gptq_torch"):
        live_weight(layer, torch.float32)


class RearrangingLinear(PackedLinear):
    """Changes its codes when it runs, as fast kernels of gptqmodel do."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        self.qweight.zero_()
        return outputs


def test_reading_a_layer_does_not_run_it(generator):
    packed = Uniform(bits=4, group_size=32).quantize(torch.randn(64, 96, generator=generator)).packed()
    layer = RearrangingLinear(packed, 4)
    first = live_weight(layer, torch.float32)
    assert live_weight(layer, torch.float32).digest == first.digest


def four_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(64, 32, bias=False)


def eight_bit(**options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, **options)


def uninitialized():
    hqq = pytest.importorskip("hqq.core.quantize")
    return hqq.HQQLinear(None, hqq.BaseQuantizeConfig(), device="cpu", initialize=False)


def on_meta():
    return packed_layer(torch.ones(64, 32)).to("meta")


def with_scaled_inputs():
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 32, bias=False)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    layer.weight.act_pre_scale = torch.ones(1)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (four_bit, r"not quantized yet.*Call model.to"),
        (lambda: eight_bit(has_fp16_weights=False), r"not quantized yet.*Call model.to"),
        (lambda: eight_bit(has_fp16_weights=True), r"has_fp16_weights=True, which keeps it in 16"),
        (uninitialized, r"not initialized yet: call initialize"),
        (on_meta, r"one without data"),
        (with_scaled_inputs, r"Expected torchao's int8 weights"),
    ],
)
def test_layers_without_a_weight_to_read_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        live_weight(make(), torch.float32)


def test_hqq_with_its_scales_in_one_tensor(generator):
    """As hqq holds them where they are kept in pinned memory."""
    layer = hqq_layer(nn.Linear(64, 32, bias=False))
    expected = live_weight(layer, torch.float32)
    layer.meta["zero_scale"] = torch.stack((layer.meta.pop("zero"), layer.meta.pop("scale")))
    assert live_weight(layer, torch.float32).digest == expected.digest


def test_errors_name_the_layer(folder):
    model = live_model("gptq", folder)
    model.model.layers[1].mlp.up_proj.scales[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"Layer model.layers.1.mlp.up_proj: Expected finite numbers in scales"):
        LiveBase(model).weight("model.layers.1.mlp.up_proj", torch.float32)


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, NF4()),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FP4(double_quantization=False)),
        ({"load_in_8bit": True}, Int8()),
    ],
)
def test_a_live_base_tells_what_made_it(config, quantizer, folder, tmp_path):
    """The quantizer, if it was quantized while it was loaded; else the place that it was loaded from."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**config))
    assert (LiveBase(model).quantizer, LiveBase(model).checkpoint) == (quantizer, None)
    with torch.no_grad():
        model.eval()(torch.arange(32)[None])
    assert LiveBase(model).quantizer == quantizer
    model.save_pretrained(tmp_path)
    stored = LiveBase(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (stored.quantizer, stored.checkpoint) == (None, str(tmp_path))
    assert stored.layers == LiveBase(model).layers


@pytest.mark.parametrize("kind", ["gptq", "hqq", "torchao"])
def test_other_packages_leave_no_trace_of_what_made_a_base(kind, folder):
    base = LiveBase(live_model(kind, folder))
    assert (base.quantizer, base.checkpoint) == (None, None)
