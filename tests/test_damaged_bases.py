"""Layers of quantized checkpoints from which something is missing, or in which something is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quailora import FP4, NF4, Int8, Uniform
from quailora.bases import StoredBase
from quailora.bases.writer import quantization_config
from quailora.errors import ModelError
from quailora.testing import make_problem

LAYER = "model.layers.0.mlp.up_proj"
SHAPE = (64, 96)


def awq(generator):
    """Random tensors of AutoAWQ's format."""
    words = {"qweight": (96, 8), "qzeros": (3, 8)}
    tensors = {name: torch.randint(-(2**31), 2**31, shape, generator=generator) for name, shape in words.items()}
    return {name: words.int() for name, words in tensors.items()} | {"scales": torch.rand(3, 64).half()}


def hqq(generator):
    """Random tensors of hqq, 4 bits in groups of 32."""
    return {
        "W_q": torch.randint(0, 256, (96, 32), generator=generator).to(torch.uint8),
        "scale": torch.rand(192, 1, generator=generator),
        "zero": 15 * torch.rand(192, 1, generator=generator),
        "shape": torch.tensor(SHAPE),
        "packing": torch.tensor(list(map(ord, "4bit_u8"))),
    }


def torchao(generator):
    """Random tensors of torchao, 8 bits."""
    codes = torch.randint(-127, 128, SHAPE, generator=generator).to(torch.int8)
    return {"_weight_qdata": codes, "_weight_scale": torch.rand(64, 1, generator=generator)}


BY_HAND = {"awq": awq, "hqq": hqq, "torchao": torchao}
QUANTIZED = {
    "gptq": Uniform(group_size=32),
    "nf4": NF4(),
    "fp4": FP4(double_quantization=False),
    "int8": Int8(),
}
FORMATS = [*BY_HAND, *QUANTIZED]


def make_base(kind, folder, generator):
    """Write a checkpoint with a single layer; return the folder."""
    if kind in BY_HAND:
        tensors, config = BY_HAND[kind](generator), {"quant_method": kind, "bits": 4, "group_size": 32}
    else:
        tensors = dict(QUANTIZED[kind].quantize(make_problem(*SHAPE).weight).packed())
        config = quantization_config({LAYER: tensors})
    save_base(folder, tensors)
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = {"model_type": "llama", "vocab_size": 8, **sizes}
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": config}), encoding="utf-8")
    return folder


def save_base(folder, tensors):
    """Write the tensors of the layer."""
    named = {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def tensors_of(folder):
    """Return the tensors of the layer."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{LAYER}."): tensor for name, tensor in tensors.items()}


def read(folder):
    return StoredBase(str(folder)).weight(LAYER, torch.float32)


def refusal(folder):
    """Return the message that the layer is refused with; nothing if it is read."""
    try:
        read(folder)
    except ModelError as error:
        return str(error)
    return ""


def changes_of(tensor):
    """Yield what can happen to a tensor: lost, cut, of another type, too long, not a number."""
    yield None
    yield tensor.flatten()
    if tensor.ndim:
        yield tensor[: len(tensor) // 2]
        yield torch.cat([tensor, tensor])
        yield tensor[..., : tensor.shape[-1] // 2]
    if tensor.is_floating_point():
        yield torch.full_like(tensor, torch.nan)
        yield torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 0, torch.inf, tensor)
        yield tensor.to(torch.int32)
    else:
        yield tensor.float()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_damage_is_refused_or_harmless(kind, tmp_path, generator):
    """In one line that names file and layer, for every tensor of every format; what is read has the right values."""
    folder = make_base(kind, tmp_path, generator)
    tensors, expected = tensors_of(folder), read(folder)
    assert expected.shape == SHAPE
    refused = 0
    for name, tensor in tensors.items():
        for changed in changes_of(tensor):
            others = {key: kept for key, kept in tensors.items() if key != name}
            save_base(folder, others if changed is None else {**others, name: changed})
            told = refusal(folder)
            if told:
                refused += 1
                assert "\n" not in told
                assert f"{LAYER} in {folder / 'model.safetensors'}: Expected" in told
            elif read(folder).shape == SHAPE:  # another shape is refused where it meets the model's
                torch.testing.assert_close(read(folder).dequantize(), expected.dequantize())
    assert refused > 2 * len(tensors)


def scaled(name, factor):
    return lambda tensors: {**tensors, name: tensors[name] * factor}


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_entry(entry, value):
    """Change an entry of bitsandbytes' description; None takes it out."""

    def change(tensors):
        name = next(name for name in tensors if "quant_state" in name)
        content = json.loads(bytes(tensors[name].tolist())) | {entry: value}
        text = json.dumps({key: kept for key, kept in content.items() if kept is not None})
        return {**tensors, name: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    return change


DAMAGES = [
    ("gptq", without("scales"), "Expected qweight, qzeros, scales, and scales is missing"),
    ("gptq", without("qweight", "scales"), "and qweight, scales is missing"),
    ("gptq", scaled("scales", torch.nan), "Expected finite numbers in scales, got 192 of 192 NaN or infinite"),
    ("gptq", scaled("qweight", 1.0), "Expected codes in qweight, a matrix of int32, got float32"),
    ("gptq", lambda t: {**t, "g_idx": t["g_idx"] + 1}, "Expected groups below 3 in g_idx, got 1 to 3"),
    ("gptq", lambda t: {**t, "g_idx": t["g_idx"] - 1}, "Expected groups below 3 in g_idx, got -1 to 1"),
    ("gptq", lambda t: {**t, "g_idx": t["g_idx"][1:]}, "the group of each of 96 columns, got int32 of shape"),
    (
        "gptq",
        lambda t: {**t, "qweight": t["qweight"].repeat(3, 1)[:20], "g_idx": torch.zeros(160).int()},
        "Expected the tensors of one layer in groups of 32, got",
    ),
    ("awq", without("qzeros"), "Expected qweight, qzeros, scales, and qzeros is missing"),
    ("awq", lambda t: {**t, "qweight": t["qweight"][:-1]}, "Expected the tensors of one layer, got"),
    ("hqq", without("W_q"), "Expected W_q, shape, and W_q is missing"),
    ("hqq", without("zero"), "with scales and zero points that are not quantized, got packing 4bit_u8"),
    (
        "hqq",
        lambda t: {**t, "shape": torch.tensor([640, 96])},
        "Expected the tensors of a matrix of 640 x 96 in 4 bits",
    ),
    ("torchao", without("_weight_scale"), "and _weight_scale is missing"),
    ("torchao", scaled("_weight_scale", 1e38), "got 5240 NaN or infinite entries"),
    ("nf4", without("weight.absmax"), "and weight.absmax is missing"),
    ("nf4", without("weight.quant_map"), "and weight.quant_map is missing"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "and weight.quant_state.bitsandbytes__nf4 is missing"),
    ("nf4", scaled("weight.quant_map", 1.01), "has for codes in weight.quant_map, got 15 others of 16"),
    (
        "nf4",
        lambda t: {**t, "weight.nested_quant_map": t["weight.nested_quant_map"].flip(0)},
        "codes in weight.nested_",
    ),
    ("nf4", without("weight.nested_absmax"), "and weight.nested_absmax is missing"),
    ("nf4", scaled("weight.nested_absmax", -1), "Expected no negative number in weight.nested_absmax, got -"),
    ("nf4", with_entry("nested_offset", None), "Expected bitsandbytes' description .*KeyError: 'nested_offset'"),
    ("nf4", with_entry("nested_offset", float("nan")), "Expected the tensors of a matrix of 64 x 96 in blocks of 64"),
    ("nf4", with_entry("shape", [96, 640]), "Expected the tensors of a matrix of 96 x 640 in blocks of 64"),
    ("nf4", with_entry("blocksize", 128), "Expected the tensors of a matrix of 64 x 96 in blocks of 128"),
    ("nf4", with_entry("dtype", "float31"), "Expected bitsandbytes' description .*AttributeError"),
    ("fp4", scaled("weight.absmax", -1), "Expected no negative number in weight.absmax, got -"),
    ("int8", without("SCB"), "Expected weight, SCB, and SCB is missing"),
    ("int8", scaled("SCB", -1), "Expected no negative number in SCB"),
    ("int8", lambda t: {**t, "weight_format": torch.tensor(1)}, "got a layout for the kernels of old GPUs"),
]


@pytest.mark.parametrize(("kind", "damage", "match"), DAMAGES)
def test_damages_are_named(kind, damage, match, tmp_path, generator):
    folder = make_base(kind, tmp_path, generator)
    save_base(folder, damage(tensors_of(folder)))
    with pytest.raises(ModelError, match=f"Layer {LAYER} in .*model.safetensors: .*{match}"):
        read(folder)


def test_the_order_of_columns_is_needed_where_there_is_one(tmp_path, generator):
    folder = make_base("gptq", tmp_path, generator)
    save_base(folder, without("g_idx")(tensors_of(folder)))
    assert read(folder).shape == SHAPE
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=f"Layer {LAYER} in .* and g_idx is missing"):
        read(folder)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_bytes_in_whatever_dtype_they_are_stored(kind, storage, tmp_path, generator):
    folder = make_base(kind, tmp_path, generator)
    expected, tensors = read(folder), tensors_of(folder)
    save_base(folder, {**tensors, "weight": tensors["weight"].view(-1, storage.itemsize).view(storage)})
    assert read(folder).digest == expected.digest


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_configurations_in_a_file_of_their_own(kind, tmp_path, generator):
    """As AutoGPTQ and AutoAWQ wrote them before transformers read their checkpoints."""
    folder = make_base(kind, tmp_path, generator)
    expected = read(folder).digest
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = model.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    assert not StoredBase(str(folder)).described
    file, old = {
        "gptq": ("quantize_config.json", config),
        "awq": ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    }[kind]
    del config["quant_method"]
    (folder / file).write_text(json.dumps(old), encoding="utf-8")
    assert read(folder).digest == expected


def test_names_with_weight_inside_are_split_where_the_module_ends(tmp_path, generator):
    folder = make_base("gptq", tmp_path, generator)
    renamed = {f"model.weight_tower.0.weight_proj.{name}": tensor for name, tensor in tensors_of(folder).items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert StoredBase(str(folder)).layers == {"model.weight_tower.0.weight_proj"}
