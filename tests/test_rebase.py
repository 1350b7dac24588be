"""A trained adapter moved to another quantized base, and several adapters of one start together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import save_llama
from helpers import init
from peft import PeftModel
from runs import killed_after
from safetensors.torch import load_file
from trainings import effective_weights, train
from transformers import AutoModelForCausalLM

from quailora import (
    GPTQ,
    HQQ,
    NF4,
    Calibration,
    Int8,
    LoraScaling,
    Optimal,
    Output,
    Uniform,
    combine,
    convert,
    initialize_model,
    merge_full,
    rebase,
)
from quailora.adapters.change import TrainedChange
from quailora.adapters.provenance import read_provenance
from quailora.bases import StoredBase
from quailora.errors import ConfigurationError, ModelError
from quailora.evaluation.check import check
from quailora.families import Dora, Miss
from quailora.models.layers import all_layers, linear_layers

CALIBRATION = Calibration(samples=8, sequence_length=64)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tokenizer):
    """A model, a start by LoRA, and what two trainings have made of it."""
    place = tmp_path_factory.mktemp("rebase")
    model = save_llama(place / "model", tokenizer)
    init(str(model), out=str(place / "start"), rank=8, samples=4, sequence_length=64, solver=Optimal())
    for seed in (1, 2):
        train(place / "start", place / f"trained-{seed}", by=1.0, seed=seed)
    return place


def changed_weights(lora, name="trained-1"):
    """`W + change` of each layer."""
    change = TrainedChange.read(lora / name)
    layers = change.layers(all_layers(AutoModelForCausalLM.from_pretrained(lora / "model")))
    return {key: layer.weight + change.of(layer, layers) for key, layer in layers.items()}


def distances(lora, folder, base):
    """How far the other base is from `W + change`, without and with its adapter."""
    change = TrainedChange.read(folder, folder)
    model = AutoModelForCausalLM.from_pretrained(lora / "model")
    layers = change.layers(all_layers(model))
    wanted = changed_weights(lora)
    stored = {key: base.weight(key, torch.float32).dequantize() for key in layers}
    alone = sum((stored[key] - wanted[key]).square().sum() for key in layers)
    adapted = sum(
        (change.effective(layer, layers, stored[key]) - wanted[key]).square().sum() for key, layer in layers.items()
    )
    return alone.item(), adapted.item()


@pytest.mark.parametrize(
    "quantizer", [GPTQ(3, group_size=32), Uniform(4, group_size=32), HQQ(4, group_size=32)], ids=repr
)
def test_the_other_base_is_that_of_init_and_the_adapter_belongs_on_it(lora, tmp_path, quantizer):
    moved = rebase(lora / "trained-1", out=tmp_path / "moved", base=quantizer, calibration=CALIBRATION)
    moved.show()
    assert len(repr(moved)) < 200 + len(str(tmp_path))  # which a notebook prints
    init(
        str(lora / "model"),
        out=str(tmp_path / "other"),
        quantizer=quantizer,
        save_base=True,
        rank=2,
        samples=8,
        sequence_length=64,
    )
    ours, theirs = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("moved", "other"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert check(tmp_path / "moved", base=tmp_path / "moved" / "base").layers == 14
    with pytest.raises(ModelError, match=r"does not belong on|is not quantized"):
        check(tmp_path / "moved", base=lora / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "other"]


@pytest.mark.parametrize("quantizer", [NF4(), Int8()], ids=repr)
def test_stock_packages_make_the_other_base(lora, tmp_path, quantizer):
    """Where they do while they load the model, nothing is written; the adapter is near what was trained."""
    rebase(lora / "trained-1", out=tmp_path / "moved", base=quantizer, calibration=CALIBRATION)
    assert not (tmp_path / "moved" / "base").exists()
    assert "holds what a training has changed" in (tmp_path / "moved" / "README.md").read_text(encoding="utf-8")
    assert check(tmp_path / "moved", base=lora / "model").layers == 14
    from quailora.bases.fresh import FreshBase

    alone, adapted = distances(lora, tmp_path / "moved", FreshBase(str(lora / "model"), quantizer))
    assert adapted < 0.7 * alone


def test_twice_the_rank_has_room_for_both(lora, tmp_path):
    for rank in (8, 16):
        options = {"base": Uniform(3, group_size=32), "calibration": CALIBRATION, "rank": rank}
        rebase(lora / "trained-1", out=tmp_path / str(rank), **options)
    bases = {rank: StoredBase(str(tmp_path / str(rank) / "base")) for rank in (8, 16)}
    errors = {rank: distances(lora, tmp_path / str(rank), base)[1] for rank, base in bases.items()}
    assert errors[16] < errors[8]
    config = json.loads((tmp_path / "16" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (16, 16)  # the factor stays


def test_a_checkpoint_that_is_there_is_used(lora, tmp_path):
    init(str(lora / "model"), out=str(tmp_path / "other"), quantizer=Uniform(4, group_size=32), save_base=True, rank=2)
    rebase(lora / "trained-1", out=tmp_path / "moved", base=tmp_path / "other" / "base", calibration=CALIBRATION)
    assert read_provenance(tmp_path / "moved").origin.checkpoint == str(tmp_path / "other" / "base")
    assert not (tmp_path / "moved" / "base").exists()
    assert check(tmp_path / "moved", base=tmp_path / "other" / "base").layers == 14


@pytest.mark.parametrize("family", [Dora(), Miss()], ids=repr)
def test_other_families_move_as_they_are(lora, tmp_path, family):
    written = Output(tmp_path / "start", save_base=True, base_format="dequantized")
    initialize_model(
        str(lora / "model"), "quailora", CALIBRATION, family=family, scaling=LoraScaling(4), base=NF4(), out=written
    )
    train(tmp_path / "start", tmp_path / "trained", AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "base"))
    result = rebase(tmp_path / "trained", out=tmp_path / "moved", base=Int8(), calibration=CALIBRATION)
    assert result.report["mean_error_share"]["error"] < 1
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == family.peft_type


def test_what_comes_after_a_move(lora, tmp_path):
    """Training goes on, and the merged model has both changes."""
    rebase(lora / "trained-1", out=tmp_path / "moved", base=NF4(), calibration=CALIBRATION)
    before = effective_weights(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lora / "model"), str(tmp_path / "moved"))
    )
    after = effective_weights(train(tmp_path / "moved", tmp_path / "further", by=0.5))
    merge_full([tmp_path / "further"], out=tmp_path / "full")
    merged = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
    for name, weight in changed_weights(lora).items():
        expected = weight + after[name] - before[name]
        torch.testing.assert_close(merged[name].weight, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ConfigurationError, match="holds the change of an earlier training"):
        convert(tmp_path / "further", out=tmp_path / "adapter")
    # Without training in between only the earlier change is left, also when the adapter moves again.
    merge_full([tmp_path / "moved"], out=tmp_path / "same", initial=tmp_path / "moved")
    again = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "same"))
    rebase(tmp_path / "moved", out=tmp_path / "twice", initial=tmp_path / "moved", base=Int8(), calibration=CALIBRATION)
    merge_full([tmp_path / "twice"], out=tmp_path / "third", initial=tmp_path / "twice")
    third = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "third"))
    for name, weight in changed_weights(lora).items():
        torch.testing.assert_close(again[name].weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third[name].weight, weight, rtol=1e-4, atol=1e-5)


def test_recipes_that_choose_the_base_are_refused(lora, tmp_path):
    with pytest.raises(ConfigurationError, match="chooses a base of its own"):
        rebase(lora / "trained-1", out=tmp_path / "moved", base=NF4(), recipe="best-joint")


def test_a_base_of_another_model_is_refused(lora, tmp_path, tokenizer):
    other = save_llama(tmp_path / "other", tokenizer, hidden_size=32, intermediate_size=64)
    init(str(other), out=str(tmp_path / "o"), quantizer=Uniform(4, group_size=32), save_base=True, rank=2, samples=4)
    with pytest.raises(ModelError, match="the base of another model"):
        rebase(lora / "trained-1", out=tmp_path / "moved", base=tmp_path / "o" / "base", calibration=CALIBRATION)
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("writes", [6, 17, 33, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 14, 24))])
def test_a_killed_move_goes_on_to_the_same_bytes(lora, tmp_path, monkeypatch, writes):
    """In the making of the base, in the walk after it, and while the result is written."""
    options = {"base": GPTQ(group_size=32), "calibration": replace(CALIBRATION, samples=4, sequence_length=32)}
    rebase(lora / "trained-1", out=tmp_path / "alone", **options)
    with killed_after(writes, monkeypatch):
        rebase(lora / "trained-1", out=tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    rebase(lora / "trained-1", out=tmp_path / "killed", **options)
    names = [file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").rglob("*.safetensors")]
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed"]


@pytest.mark.parametrize("factors", [(), (1.0, -0.5)])
def test_adapters_of_one_start_are_added_with_the_start_once(lora, tmp_path, factors):
    model = AutoModelForCausalLM.from_pretrained(lora / "model")
    trained = [lora / f"trained-{seed}" for seed in (1, 2)]
    changes = [TrainedChange.read(folder) for folder in trained]
    layers = changes[0].layers(all_layers(model))
    weights = factors or (1.0, 1.0)
    combine(trained, factors, out=tmp_path / "base")
    combine(trained, factors, out=tmp_path / "full", on="full precision")
    merge_full(trained, factors=factors, out=tmp_path / "merged")
    stock = {
        name: effective_weights(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lora / "model"), str(tmp_path / name))
        )
        for name in ("base", "full")
    }
    start = effective_weights(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lora / "model"), str(lora / "start"))
    )
    merged = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    for name, layer in layers.items():
        added = sum(weight * change.of(layer, layers) for weight, change in zip(weights, changes, strict=True))
        torch.testing.assert_close(stock["base"][name] - start[name], added, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(stock["full"][name] - layer.weight, added, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(merged[name].weight - layer.weight, added, rtol=1e-4, atol=2e-5)
    assert check(tmp_path / "base", base=lora / "model").layers == 14  # it knows its base


@pytest.mark.parametrize(("factors", "right"), [((0.25, 0.75), True), ((0.7, 0.7), False)])
def test_pefts_own_sum_is_right_only_with_factors_that_add_up_to_one(lora, tmp_path, factors, right):
    """Otherwise the common start, which makes up for the error of the base, counts more than once."""
    model = AutoModelForCausalLM.from_pretrained(lora / "model")
    stock = PeftModel.from_pretrained(model, str(lora / "trained-1"), adapter_name="one")
    stock.load_adapter(str(lora / "trained-2"), adapter_name="two")
    stock.add_weighted_adapter(["one", "two"], list(factors), "both", combination_type="cat")
    stock.set_adapter("both")
    found = effective_weights(stock)
    combine([lora / "trained-1", lora / "trained-2"], factors, out=tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(lora / "model")
    expected = effective_weights(PeftModel.from_pretrained(plain, str(tmp_path / "ours")))
    apart = max((found[name] - weight).abs().max().item() for name, weight in expected.items())
    assert (apart < 1e-4) == right, apart


def test_adapters_of_other_starts_are_not_added(lora, tmp_path):
    init(str(lora / "model"), out=str(tmp_path / "start"), rank=8, samples=2, sequence_length=32, solver=Optimal())
    train(tmp_path / "start", tmp_path / "trained")
    with pytest.raises(ConfigurationError, match="several starts"):
        combine([lora / "trained-1", tmp_path / "trained"], out=tmp_path / "out")
    with pytest.raises(ConfigurationError, match="Expected a factor for each of 1 adapters, got 2"):
        combine([lora / "trained-1"], (1.0, 1.0), out=tmp_path / "out")


def test_the_command_line(lora, tmp_path, run, monkeypatch):
    monkeypatch.chdir(lora)
    options = ["--samples", "4", "--sequence-length", "64"]
    status, _, logged = run("rebase", "trained-1", "--out", tmp_path / "moved", *options)
    assert status == 1
    assert "Expected --base or --quantizer for the base to move to, got neither" in " ".join(logged.split())
    status, shown, logged = run("rebase", "trained-1", "--quantizer", "int8", "--out", tmp_path / "moved", *options)
    assert status == 0, logged
    assert "with this adapter" in shown
    status, shown, logged = run("convert", "trained-1", "--merge", "--dtype", "bfloat16", "--out", tmp_path / "full")
    assert status == 0, logged
    assert "bfloat16" in shown
    status, shown, logged = run(
        "convert", "trained-1", "--add", "trained-2", "--factors", "0.5", "0.5", "--out", tmp_path / "sum"
    )
    assert status == 0, logged
    assert "24" in shown  # three times the rank
