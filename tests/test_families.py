"""Every family from checkpoint to stock PEFT, streamed from disk and in memory."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, make_model
from peft import PeftModel
from runs import small_run
from safetensors.torch import load_file

from quailora import NF4, Optimal
from quailora.calibration.walk import collect_statistics
from quailora.calibration.windows import Calibration
from quailora.models.layers import all_layers
from quailora.models.load import load_model

METHOD = {"solver": Optimal(), "alpha": 8.0, "samples": 4}
MIXTURES = ["Mixtral", "Qwen3Moe"]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


@pytest.fixture
def checkpoint(family, tmp_path, tokenizer):
    folder = tmp_path / "model"
    make_model(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ids(generator):
    return torch.randint(3, 300, (2, 24), generator=generator)


def targets(family):
    return ["all-linear", "experts"] if family in MIXTURES else ["all-linear"]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_checkpoint_to_stock_peft(family, checkpoint, tokenizer, ids, tmp_path):
    """Streamed equals in memory; errors are what the report says; stock PEFT computes with `Q + C` (law 5)."""
    for offload in ("always", "never"):
        small_run(
            checkpoint,
            tmp_path / offload,
            **METHOD,
            offload=offload,
            save_base=True,
            base_format="dequantized",
            targets=targets(family),
        )
    streamed = load_file(tmp_path / "always" / "adapter_model.safetensors")
    torch.testing.assert_close(streamed, load_file(tmp_path / "never" / "adapter_model.safetensors"))

    base = load_model(str(tmp_path / "always" / "base")).model
    original = load_model(str(checkpoint)).model
    layers, originals = all_layers(base), all_layers(original)
    corrections = unpacked(streamed, layers)
    for name, layer in originals.items():
        torch.testing.assert_close(layers[name].weight, NF4().quantize(layer.weight).dequantize())

    windows = Calibration(samples=4, sequence_length=32).windows(tokenizer)
    statistics = collect_statistics(original, originals, windows)
    report = json.loads((tmp_path / "always" / "report.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in report["layers"]] == list(layers)
    for record in report["layers"]:
        name = record["name"]
        left = (originals[name].weight - layers[name].weight - corrections[name]).double()
        error = ((left @ statistics[name].second_moment) * left).sum().item()
        assert record["error"] == pytest.approx(error, rel=1e-3)
        assert record["error"] < 0.97 * record["error_none"]

    plain, full = base(ids).logits, original(ids).logits
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.add_(corrections[name])
    expected = base(ids).logits
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.sub_(corrections[name])
    found = PeftModel.from_pretrained(base, str(tmp_path / "always"))(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - full).norm() < (plain - full).norm()


@pytest.mark.parametrize("inputs", ["quantized", "asymmetric"])
@pytest.mark.parametrize("family", ["OPT", "Bloom", "GPT2", "Qwen3Moe"])
def test_other_inputs(family, inputs, checkpoint, ids, tmp_path):
    """With layers outside the blocks, blocks that return tuples, turned weights, experts: closer to full precision."""
    small_run(
        checkpoint,
        tmp_path / "out",
        **METHOD,
        inputs=inputs,
        offload="always",
        save_base=True,
        base_format="dequantized",
        targets=targets(family),
    )
    base = load_model(str(tmp_path / "out" / "base")).model
    plain, full = base(ids).logits, load_model(str(checkpoint)).model(ids).logits
    found = PeftModel.from_pretrained(base, str(tmp_path / "out"))(ids).logits
    assert (found - full).norm() < 0.95 * (plain - full).norm()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    chosen = [record["asymmetry"] for record in report["layers"] if ".experts." not in record["name"]]
    assert all(value is None for value in chosen) == (inputs == "quantized")


def unpacked(adapter, layers):
    """The correction of each layer, taken from the tensors of an adapter file with a scaling of 2."""
    corrections, first_parameters = {}, {}
    for name, layer in layers.items():
        place = f"base_model.model.{name}"
        if layer.expert is not None:
            module, _, parameter = layer.group.rpartition(".")
            first = first_parameters.setdefault(module, parameter) == parameter  # PEFT wraps the first one innermost
            place = f"base_model.model.{module}{'.base_layer' if first else ''}"
        lora_A, lora_B = adapter[f"{place}.lora_A.weight"], adapter[f"{place}.lora_B.weight"]
        if layer.expert is not None:
            experts = len(getattr(layer.module, layer.parameter))
            lora_A = lora_A.view(experts, 4, -1)[layer.expert]
            lora_B = lora_B.view(-1, 4, experts)[:, :, layer.expert]
        corrections[name] = 2 * lora_B @ lora_A
    return corrections
