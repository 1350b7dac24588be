"""What a dry run says, against what is there and what a run then takes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, make_model, save_llama
from helpers import init
from safetensors.torch import load_file
from torch import nn

from quailora import GPTQ, NF4, Initializer, Optimal
from quailora.adapters.lora import LoraScaling
from quailora.errors import ConfigurationError, DoesNotFitError, ModelError, TargetError
from quailora.families import find_family
from quailora.methods.method import Method
from quailora.models.layers import Layer
from quailora.pipeline.estimate import Estimate
from quailora.pipeline.formats import bits_of_layers
from quailora.support.machine import duration, parse_size, size

SETTINGS = {"rank": 4, "samples": 4, "sequence_length": 32}


def dry(model, tmp_path, **options):
    result = init(str(model), out=str(tmp_path / "out"), dry_run=True, **{**SETTINGS, **options})
    assert isinstance(result, Estimate)
    return result


def test_a_dry_run_writes_nothing_and_needs_no_weights(tiny_llama, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    found = dry(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert [row[:3] for row in found.rows] == [
        ("q_proj", 2, (64, 64)),
        ("k_proj", 2, (32, 64)),
        ("v_proj", 2, (32, 64)),
        ("o_proj", 2, (64, 64)),
        ("gate_proj", 2, (96, 64)),
        ("up_proj", 2, (96, 64)),
        ("down_proj", 2, (64, 96)),
    ]
    found.show()
    printed = capsys.readouterr().out
    assert "fits in memory" in printed
    assert "4.13 bits per weight" in printed or "4.14 bits per weight" in printed


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_adapter(family, tmp_path, tokenizer):
    model = make_model(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"save_base": family == "Falcon"}  # whose linear layers stock transformers does not quantize
    found = dry(tmp_path / "model", tmp_path, **options)
    init(str(tmp_path / "model"), out=str(tmp_path / "out"), solver=Optimal(), **SETTINGS, **options)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.adapter_bytes == sum(tensor.nbytes for tensor in adapter.values())
    assert found.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert found.streamed < found.in_memory
    assert found.seconds > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("vera", "float32"), ("randlora", "float32"), ("shira", "float32"), ("shira", "bfloat16"), ("miss", "bfloat16")],
)
def test_sizes_of_other_families_are_those_of_their_files(family, dtype, tiny_llama, tmp_path):
    """Tensors that layers share are counted once, and indices keep their four bytes."""
    options = {"family": find_family(family)(), "factors_dtype": dtype, "recipe": "lorc"}
    found = dry(tiny_llama, tmp_path, **options)
    init(str(tiny_llama), out=str(tmp_path / "out"), **SETTINGS, **options)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.adapter_bytes == sum(tensor.nbytes for tensor in adapter.values())


def test_time_counts_rounds_and_training(tiny_llama, tmp_path, monkeypatch):
    """On a machine that always does as much a second."""
    monkeypatch.setattr("quailora.pipeline.estimate.flops", lambda dtype, device: 1e9)
    seconds = {
        name: dry(tiny_llama, tmp_path, recipe=name).seconds
        for name in ("qera-exact", "srr", "caldera", "lorc", "lq-lora", "best", "polished", "best-joint")
    }
    seconds["block-trained"] = dry(tiny_llama, tmp_path, recipe="block-trained").seconds
    assert seconds["qera-exact"] < seconds["srr"] < seconds["caldera"]
    assert seconds["lorc"] < seconds["lq-lora"]
    assert seconds["best"] < seconds["block-trained"]
    assert seconds["qera-exact"] < seconds["best"] < seconds["best-joint"] < seconds["polished"]


def by(quantizer):
    return Method(Initializer(quantizer, Optimal()), LoraScaling(4))


def test_bits_count_everything():
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    small, large = (Layer("layer", nn.Linear(*sides, device="meta")) for sides in ((1024, 64), (14336, 5000)))
    assert bits_of_layers({"layer": small}, by(NF4())) == pytest.approx(
        NF4().quantize(weight).bits_per_weight, abs=0.01
    )
    assert 3 < bits_of_layers({"layer": large}, by(GPTQ(bits=3))) < 4


def test_a_limit_decides_where_weights_stay(tiny_llama, tmp_path, monkeypatch):
    needed = dry(tiny_llama, tmp_path)
    between = str((needed.in_memory + needed.streamed) // 2)
    assert dry(tiny_llama, tmp_path, memory_limit=between).verdict.startswith("fits block by block")
    asked = []
    from quailora.pipeline import loading as pipeline

    original = pipeline.load_model
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **b: asked.append(b["offload"]) or original(*a, **b))
    for limit, on_disk in ((between, True), ("100GiB", False)):
        init(str(tiny_llama), out=str(tmp_path / "out"), memory_limit=limit, overwrite=True, **SETTINGS)
        assert (asked.pop() is not None) == on_disk
    with pytest.raises(
        DoesNotFitError, match=r"below 100 MiB, but the run needs about \d+ MiB of memory with the weights"
    ):
        init(str(tiny_llama), out=str(tmp_path / "no"), memory_limit="100MiB", **SETTINGS)
    with pytest.raises(DoesNotFitError, match="`offload='auto'`"):
        init(str(tiny_llama), out=str(tmp_path / "no"), memory_limit=between, offload="never", **SETTINGS)
    assert not (tmp_path / "no").exists()


def test_mistakes_are_found_before_anything_is_loaded(tiny_llama, tmp_path):
    with pytest.raises(TargetError, match="layers cannot carry the rank"):
        dry(tiny_llama, tmp_path, rank=500)
    with pytest.raises(ModelError, match="sequence length of at most 256"):
        dry(tiny_llama, tmp_path, sequence_length=300)
    with pytest.raises(ModelError, match="there is no such folder, and the hub has no model of this name"):
        dry(tmp_path / "nothing", tmp_path)
    with pytest.raises(ConfigurationError, match="Expected a size such as 8GiB, 500MB or 4G, got 'much'"):
        dry(tiny_llama, tmp_path, memory_limit="much")


def test_experts_need_a_saved_base(tmp_path, tokenizer):
    make_model("Mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"leaves fused experts in full precision.*`save_base=True`"):
        dry(tmp_path / "model", tmp_path, targets=["experts"])
    found = dry(tmp_path / "model", tmp_path, targets=["experts"], save_base=True)
    assert [row[:3] for row in found.rows] == [("gate_up_proj", 12, (96, 32)), ("down_proj", 12, (32, 48))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("8G", 8 * 2**30), ("500MB", 500 * 10**6), ("1.5k", 1536), ("123", 123), ("2 TiB", 2**41)],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


def test_sizes_and_times_are_written():
    assert [size(10**6), size(5 * 2**30)] == ["1 MiB", "5.00 GiB"]
    assert [duration(5.0), duration(600.0), duration(1e5)] == ["5 s", "10 min", "27.8 h"]


@pytest.mark.parametrize(("width", "warned"), [(96, True), (64, False)])
def test_four_bit_layers_that_a_cpu_decodes_wrongly_are_warned_of(tokenizer, tmp_path, caplog, width, warned):
    model = save_llama(tmp_path / "model", tokenizer, hidden_size=width, intermediate_size=128)
    dry(model, tmp_path)
    said = "On a CPU, bitsandbytes decodes 4-bit layers wrongly whose inputs are no multiple of 64: 12 of 14"
    assert (said in caplog.text) == warned
