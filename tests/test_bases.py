"""Bases that are quantized already, against formats packed by hand and checkpoints that stock packages write."""

from __future__ import annotations

import json

import pytest
import torch
from families import save_llama
from helpers import each_quantizer, evaluate, init
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from quailora import FP4, GPTQ, NF4, NF4GPTQ, Int8, Optimal, Uniform
from quailora.bases import READERS, StoredBase
from quailora.bases.awq import read_awq
from quailora.bases.gptq import read_gptq
from quailora.bases.hqq import read_hqq
from quailora.bases.torchao import read_torchao
from quailora.bases.writer import quantization_config, save_packed
from quailora.errors import ConfigurationError, ModelError, TargetError
from quailora.evaluation.check import check
from quailora.evaluation.evaluate import quantize_in_place
from quailora.models.layers import linear_layers
from quailora.testing import make_problem

FAST = {"solver": Optimal(), "rank": 4, "samples": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A Llama whose widths suit every format."""
    options = {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}
    return save_llama(tmp_path_factory.mktemp("model"), tokenizer, **options)


@each_quantizer
def test_what_is_packed_is_read_again(quantizer):
    """Codes, scales and all: the weight that is read is the one that was written."""
    problem = make_problem(64, 96)
    stored = quantizer.quantize(problem.weight, problem.statistics)
    packed = stored.packed()
    if not packed:
        pytest.skip("no stock format")
    config = quantization_config({"layer": packed})
    found = READERS[config["quant_method"]](packed, config | {"checkpoint_format": "gptq_v2"}, torch.float32)
    assert found.digest == stored.digest
    torch.testing.assert_close(found.dequantize(), stored.dequantize(), rtol=0, atol=0)


def packed_by_hand(codes, bits):
    """Codes of a column one after the other, lowest bit first, in words of 32 bits."""
    rows, columns = codes.shape
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int64)
    for row in range(rows):
        for bit in range(bits):
            place = row * bits + bit
            words[place // 32] |= (codes[row].long() >> bit & 1) << place % 32
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_by_hand(bits, layout, generator):
    """`scale * (code - zero)`, with groups in any order and zero points less one in the first version."""
    codes = torch.randint(0, 2**bits, (64, 32), generator=generator)
    zeros = torch.randint(1, 2**bits, (4, 32), generator=generator)
    scales = torch.rand(4, 32, generator=generator).half()
    g_idx = torch.arange(64).remainder(4).int()
    tensors = {
        "qweight": packed_by_hand(codes, bits),
        "qzeros": packed_by_hand((zeros - int(layout == "gptq")).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx,
    }
    config = {"bits": bits, "group_size": 16, "checkpoint_format": layout}
    found = read_gptq(tensors, config, torch.float32).dequantize()
    torch.testing.assert_close(found, (scales.float()[g_idx] * (codes - zeros[g_idx])).T, rtol=0, atol=0)
    other = {"bits": 5, "group_size": 64, "checkpoint_format": layout}  # some layers have their own
    assert read_gptq(tensors, other, torch.float32).digest == read_gptq(tensors, config, torch.float32).digest
    with pytest.raises(ModelError, match="Expected the tensors of one layer"):
        read_gptq(tensors | {"scales": scales[:, :16]}, config, torch.float32)


def test_awq_by_hand(generator):
    """Eight outputs to a word, the even ones first."""
    codes = torch.randint(0, 16, (64, 32), generator=generator)
    zeros = torch.randint(0, 16, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator).half()

    def pack(values):
        words = torch.zeros(len(values), 4, dtype=torch.int64)
        for word in range(4):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= values[:, 8 * word + output] << 4 * nibble
        return torch.where(words >= 2**31, words - 2**32, words).int()

    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}
    found = read_awq(tensors, {"bits": 4, "group_size": 32, "version": "gemm"}, torch.float32).dequantize()
    groups = torch.arange(64) // 32
    torch.testing.assert_close(found, (scales.float()[groups] * (codes - zeros[groups])).T, rtol=0, atol=0)
    with pytest.raises(ModelError, match="in the layout 'gemm', got 4 bits in 'gemv'"):
        read_awq(tensors, {"version": "gemv"}, torch.float32)


@pytest.mark.parametrize(
    "quantizer",
    [GPTQ(group_size=32), GPTQ(bits=3, symmetric=True, activation_order=True), Int8(), NF4(), NF4GPTQ(), FP4()],
    ids=repr,
)
def test_an_adapter_for_a_base_is_that_of_its_quantizer(quantizer, model, tmp_path):
    """Written beside an adapter and taken with `--base`, a base gets the same adapter; `check` tells bases apart."""
    init(str(model), out=str(tmp_path / "a"), quantizer=quantizer, save_base=True, **FAST)
    base = tmp_path / "a" / "base"
    init(str(model), out=str(tmp_path / "b"), base=str(base), **FAST)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert f'"{base}", dtype' in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    for name in "ab":
        assert check(str(tmp_path / name), base=str(base)).layers == 14
    found = [evaluate(str(model), adapter=str(tmp_path / name), windows=2, sequence_length=64).results for name in "ab"]
    assert found[0]["quantized + adapter"].perplexity == pytest.approx(found[1]["quantized + adapter"].perplexity)
    assert found[0]["quantized"].perplexity == found[1]["quantized"].perplexity


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("as_float", [False, True])
def test_hqq_layers(bits, axis, as_float):
    """Whatever the width, the direction of groups and the dtype of the words, their layer's own weight."""
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis, view_as_float=as_float)
    layer = hqq.HQQLinear(torch.nn.Linear(64, 96, bias=False), config, compute_dtype=torch.float32, device="cpu")
    tensors = layer.state_dict()
    found = read_hqq(tensors, {}, torch.float32)
    torch.testing.assert_close(found.dequantize(), layer.dequantize(), rtol=0, atol=0)
    del tensors["scale"]
    with pytest.raises(ModelError, match="Expected a layer of hqq packed as one of"):
        read_hqq(tensors, {}, torch.float32)


def quantized_by_hqq(model, folder):
    """Return a model with layers of hqq, and save it as hqq does."""
    hqq = pytest.importorskip("hqq.core.quantize")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = hqq.BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
    for name in linear_layers(loaded):
        theirs = hqq.HQQLinear(loaded.get_submodule(name), config, compute_dtype=torch.float32, device="cpu")
        loaded.set_submodule(name, theirs)
    shared = {"lm_head.weight"}  # with the embedding
    folder.mkdir()
    save_file(
        {name: tensor for name, tensor in loaded.state_dict().items() if name not in shared},
        folder / "model.safetensors",
    )
    loaded.config.quantization_config = {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    loaded.config.save_pretrained(folder)
    return loaded


def quantized_by_torchao(model, folder):
    """Return a model with layers of torchao, and save it by transformers."""
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    loaded.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("quantized_by", [quantized_by_hqq, quantized_by_torchao])
def test_an_adapter_for_a_base_of(quantized_by, model, tmp_path):
    """Stock PEFT computes on that base what we compute."""
    stock = quantized_by(model, tmp_path / "stock")
    init(str(model), out=str(tmp_path / "a"), base=str(tmp_path / "stock"), **FAST)
    assert check(str(tmp_path / "a"), base=str(tmp_path / "stock")).layers == 14
    ours = AutoModelForCausalLM.from_pretrained(model)
    quantize_in_place(ours, StoredBase(str(tmp_path / "stock")))
    ids = torch.arange(32)[None]
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)
    ours, stock = (PeftModel.from_pretrained(each, str(tmp_path / "a")) for each in (ours, stock))
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)


def test_torchao_in_less_than_8_bits_is_refused():
    with pytest.raises(ModelError, match="Expected torchao's int8 weights"):
        read_torchao({"_weight_qdata": torch.zeros(4, 4, dtype=torch.uint8)}, {}, torch.float32)


@pytest.mark.parametrize(
    ("quantizer", "config"),
    [
        (NF4(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (FP4(double_quantization=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        (Int8(), {"load_in_8bit": True}),
    ],
    ids=repr,
)
def test_bitsandbytes_checkpoints_are_those_of_transformers(quantizer, config, model, tmp_path):
    """What transformers saves has the tensors that we save, and what we save transformers loads."""
    stock = AutoModelForCausalLM.from_pretrained(model, quantization_config=BitsAndBytesConfig(**config))
    stock.save_pretrained(tmp_path / "stock")
    init(str(model), out=str(tmp_path / "a"), quantizer=quantizer, save_base=True, **FAST)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "a" / "base", tmp_path / "stock"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" not in name:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    assert check(str(tmp_path / "a"), base=str(tmp_path / "stock")).layers == 14
    assert check(str(tmp_path / "a"), base=str(model)).layers == 14  # quantized while it loads
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base")
    ids = torch.arange(32)[None]
    torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=0, atol=0)
    PeftModel.from_pretrained(loaded, str(tmp_path / "a"))


@pytest.mark.parametrize("quantizer", [GPTQ(bits=3), NF4GPTQ(), Int8()], ids=repr)
def test_a_model_on_disk_is_packed_too(quantizer, model, tmp_path):
    for offload in ("always", "never"):
        init(str(model), out=str(tmp_path / offload), quantizer=quantizer, save_base=True, offload=offload, **FAST)
    found, expected = (tmp_path / offload / "base" for offload in ("always", "never"))
    tensors = [load_file(folder / "model.safetensors") for folder in (found, expected)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (found, expected)]
    assert configs[0] == configs[1]


def test_check_tells_other_bases(model, tmp_path):
    for name, quantizer in {"a": GPTQ(group_size=32), "b": GPTQ(group_size=64), "c": NF4GPTQ()}.items():
        init(str(model), out=str(tmp_path / name), quantizer=quantizer, save_base=True, **FAST)
    for name in "bc":
        with pytest.raises(ModelError, match="14 of 14 layers have other codes or scales"):
            check(str(tmp_path / "a"), base=str(tmp_path / name / "base"))
    with pytest.raises(ModelError, match=r"is not quantized, and the base of .* is not made while"):
        check(str(tmp_path / "a"), base=str(model))
    file = tmp_path / "a" / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.qweight"][0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of 14 layers .*, model.layers.1.mlp.up_proj first"):
        check(str(tmp_path / "a"), base=str(tmp_path / "a" / "base"))


def test_bad_bases_are_refused(model, tmp_path):
    arguments = {"out": str(tmp_path / "out"), **FAST}
    with pytest.raises(ModelError, match="has no quantization_config"):
        init(str(model), base=str(model), **arguments)
    for quantizer in (Uniform(), NF4()):
        with pytest.raises(ConfigurationError, match="Expected `quantizer` or `base`, got both"):
            init(str(model), base=str(model), quantizer=quantizer, **arguments)
    init(str(model), out=str(tmp_path / "a"), quantizer=GPTQ(), save_base=True, **FAST)
    base = tmp_path / "a" / "base"
    with pytest.raises(ConfigurationError, match="would quantize it again"):
        init(str(model), out=str(tmp_path / "out"), base=str(base), recipe="loftq", rank=4, samples=4)
    tensors = load_file(base / "model.safetensors")
    parts = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up_proj" not in name}
    save_file(parts, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"1 of 14 target layers are not quantized in .*layers.0.mlp.up_proj among"):
        init(str(model), base=str(base), **arguments)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["quant_method"] = "aqlm"
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"is quantized by 'aqlm'. quailora reads gptq, awq, bitsandbytes, hqq, torchao"
    ):
        StoredBase(str(base)).config  # noqa: B018


def test_zero_points_of_zero_need_the_second_version(model, tmp_path):
    """The first version stores them less one; where a group has no negative weight, there is no such number."""
    from quailora.models.load import load_model

    loaded = load_model(str(model))
    layers = linear_layers(loaded.model)
    for positive, layout in ((False, "gptq"), (True, "gptq_v2")):
        weights = {name: layer.weight.abs() if positive else layer.weight for name, layer in layers.items()}
        stored = {name: Uniform().quantize(weight) for name, weight in weights.items()}
        save_packed(tmp_path / layout, loaded, {name: each.packed() for name, each in stored.items()})
        base = StoredBase(str(tmp_path / layout))
        assert base.config["checkpoint_format"] == layout
        for name, each in stored.items():
            assert base.weight(name, torch.float32).digest == each.digest
