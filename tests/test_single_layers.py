"""Bases whose layers have quantizers of their own, or stay in full precision: run, written, read and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from families import save_llama
from helpers import evaluate
from peft import PeftModel
from transformers import AutoModelForCausalLM

import quailora
from quailora import NF4, Calibration, Int8, LoraScaling, Output, StoredBase, Uniform
from quailora.calibration.walk import collect_statistics
from quailora.core.metrics import gram
from quailora.errors import ConfigurationError, TargetError
from quailora.evaluation.evaluate import quantize_in_place
from quailora.methods.recipes import find_recipe
from quailora.models.layers import linear_layers
from quailora.models.load import load_model

CALIBRATION = Calibration(samples=8, sequence_length=32)
BLOCK = "model.layers.0"
MIXED = {
    f"{BLOCK}.self_attn.q_proj": Uniform(2, 16),
    f"{BLOCK}.self_attn.v_proj": Uniform(8, 32),
    f"{BLOCK}.mlp.down_proj": None,
    "model.layers.1.mlp.up_proj": Uniform(3, 32),
}


def made(model, recipe, quantizer, quantizers, out=None, **options):
    """Run a recipe with quantizers of single layers."""
    method = find_recipe(recipe).method(quantizer, LoraScaling(4, 8), quantizers=quantizers)
    return quailora.initialize_model(str(model), method, CALIBRATION, out=out, **options)


@pytest.mark.parametrize("recipe", ["qera-exact", "asymmetric-half", "asymmetric-half-srr", "caldera"])
def test_a_base_of_many_bits_is_what_the_run_has_made(tiny_llama, tmp_path, recipe):
    """Codes and scales of each layer are read as they were written; layers in full precision are as in the model."""
    result = made(tiny_llama, recipe, Uniform(4, 32), MIXED, tmp_path / "a")
    base = StoredBase(str(tmp_path / "a/base"))
    layers = linear_layers(load_model(str(tiny_llama)).model)
    finished = result.output.finished
    assert base.layers == finished.keys() == layers.keys() - {f"{BLOCK}.mlp.down_proj"}
    for name, stored in finished.items():
        torch.testing.assert_close(base.weight(name, torch.float32).dequantize(), stored.dequantized, rtol=0, atol=0)
        expected = (MIXED.get(name) or Uniform(4, 32)).quantize(layers[name].weight).bits_per_weight
        assert stored.record.bits_per_weight == pytest.approx(expected, rel=0.02)
    config = base.config
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert {key: one for key, one in config["dynamic"].items() if one} == {
        r"+:^model\.layers\.0\.self_attn\.q_proj$": {"bits": 2, "group_size": 16},
        r"+:^model\.layers\.0\.self_attn\.v_proj$": {"bits": 8, "group_size": 32},
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 3, "group_size": 32},
    }
    assert r"-:^model\.layers\.0\.mlp\.down_proj$" in config["dynamic"]
    written = StoredBase(str(tmp_path / "a/base"))
    assert "modules_in_block_to_quantize" not in written.config  # which transformers would load with one width


def test_an_adapter_is_measured_on_its_base_of_many_bits(tiny_llama, tmp_path):
    """And belongs on the base beside it, which `evaluate` finds."""
    made(tiny_llama, "asymmetric-half-srr", Uniform(4, 32), MIXED, tmp_path / "a")
    origin = json.loads((tmp_path / "a/quailora.json").read_text(encoding="utf-8"))["origin"]
    assert origin["needs"] == "base"
    results = evaluate(tiny_llama, adapter=tmp_path / "a").results
    # The losses of a model of random weights go up and down by chance; how far they move in each window does not.
    full, quantized, corrected = (torch.tensor(one.window_losses) for one in results.values())
    assert (corrected - full).norm() < (quantized - full).norm()


@pytest.mark.parametrize("quantizer", [NF4(), Int8()], ids=repr)
def test_stock_transformers_loads_layers_in_full_precision(tokenizer, tmp_path, quantizer):
    """With bitsandbytes, whose configuration lists them: the same logits as the run's own weights give."""
    kept = dict.fromkeys((f"{BLOCK}.mlp.down_proj", "model.layers.1.self_attn.v_proj"))
    model = save_llama(tmp_path / "model", tokenizer)
    made(model, "qera-exact", quantizer, kept, tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a/base")
    for name in kept:
        assert type(theirs.get_submodule(name)) is torch.nn.Linear
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    ours = AutoModelForCausalLM.from_pretrained(model)
    quantize_in_place(ours, StoredBase(str(tmp_path / "a/base")))
    ours = PeftModel.from_pretrained(ours, tmp_path / "a").eval()
    ids = torch.arange(40)[None]
    # On a CPU, bitsandbytes multiplies in bfloat16, and its layers of 8 bits round their inputs, too.
    tolerance = 0.05 if isinstance(quantizer, Int8) else 5e-3
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=tolerance, atol=tolerance)


def test_kept_layers_are_listed_for_transformers_where_bits_are_the_same(tiny_llama, tmp_path):
    """It knows one configuration for all layers, and a list of those that it holds for."""
    kept = {f"{BLOCK}.mlp.down_proj": None}
    made(tiny_llama, "qera-exact", Uniform(4, 32), kept, tmp_path / "a")
    config = StoredBase(str(tmp_path / "a/base")).config
    (names,) = config["modules_in_block_to_quantize"]
    assert len(names) == 13
    assert not kept.keys() & set(names)
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}


@pytest.mark.parametrize(
    ("quantizers", "options", "error", "message"),
    [
        ({"model.layers.9.mlp.up_proj": Uniform(2)}, {}, TargetError, "does not have. Its first linear layer is model"),
        ({f"{BLOCK}.mlp.up_proj": NF4()}, {}, ConfigurationError, "all are in AutoGPTQ's, which NF4"),
        ({f"{BLOCK}.mlp.up_proj": Uniform(5)}, {}, ConfigurationError, r"which Uniform\(bits=5.* is not"),
        ({f"{BLOCK}.mlp.up_proj": Uniform(3)}, {"base_format": "awq"}, ConfigurationError, "uniform levels of 4 bits"),
        ({f"{BLOCK}.mlp.up_proj": None}, {"base_format": "awq"}, ConfigurationError, "AutoGPTQ's format only"),
        ({f"{BLOCK}.mlp.up_proj": None}, {"targets": ["up_proj"]}, TargetError, "the base keeps them in full prec"),
    ],
)
def test_bases_that_no_checkpoint_holds_are_refused(tiny_llama, tmp_path, quantizers, options, error, message):
    """Before a weight is read."""
    targets = options.pop("targets", ["all-linear"])
    with pytest.raises(error, match=message):
        made(tiny_llama, "qera-exact", Uniform(), quantizers, Output(tmp_path / "a", **options), targets=targets)
    assert not (tmp_path / "a").exists()


def test_a_base_that_is_there_has_its_quantizers(tiny_llama, tmp_path):
    made(tiny_llama, "qera-exact", Uniform(), {}, Output(tmp_path / "a", save_base=True))
    base = StoredBase(str(tmp_path / "a/base"))
    method = find_recipe("qera-exact").method(None, LoraScaling(4), base, {f"{BLOCK}.mlp.up_proj": Uniform(2)})
    with pytest.raises(ConfigurationError, match="quantized already, so its layers cannot have"):
        quailora.initialize_model(str(tiny_llama), method, CALIBRATION)


@pytest.mark.parametrize("quantizer", [Uniform(3, 32), NF4()], ids=repr)
def test_layers_without_a_correction_are_rounded_as_carefully(tiny_llama, quantizer):
    """Held-out tokens choose their rounding as well, and errors of outputs are smaller than by rounding to nearest."""
    method = find_recipe("best-joint").method(quantizer, LoraScaling(4))
    text = Calibration(samples=64, sequence_length=64)
    result = quailora.initialize_model(str(tiny_llama), method, text, targets=["q_proj"])
    loaded = load_model(str(tiny_llama))
    layers = linear_layers(loaded.model)
    seen = collect_statistics(loaded.model, layers, text.windows(loaded.tokenizer))
    better = 0
    for name, stored in result.output.finished.items():
        metric, weight = gram(seen[name]), layers[name].weight
        if stored.record is None:
            found, nearest = (
                metric.energy(weight - one) for one in (stored.dequantized, quantizer.quantize(weight).dequantize())
            )
            better += found < 0.95 * nearest
            assert found < 1.05 * nearest  # which is chosen where held-out tokens see no gain
    assert better >= 8
