"""Nothing that is read is removed, no part of an adapter is lost, and its own base is never refused."""

from __future__ import annotations

import json

import pytest
import torch
from families import save_llama
from helpers import init
from peft import LoraConfig, PeftModel, get_peft_model
from runs import SMALL
from safetensors.torch import load_file, save_file
from trainings import effective_weights, train
from transformers import AutoModelForCausalLM

import quailora
from quailora import FAMILIES, Int8, Resources, combine, convert, merge_full, rebase
from quailora.errors import ConfigurationError, ModelError, OutputExistsError
from quailora.evaluation.check import check
from quailora.evaluation.tasks import score_in
from quailora.models.locate import resolve
from quailora.support import files as outputs

FAST = {"samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, an adapter, what training has made of it, and that once more on another base."""
    place = tmp_path_factory.mktemp("kept")
    save_llama(place / "model", tokenizer, num_key_value_heads=2)
    init(str(place / "model"), out=str(place / "start"), rank=4, **FAST)
    train(place / "start", place / "trained", by=0.5)
    text = quailora.Calibration(samples=4, sequence_length=32)
    rebase(place / "trained", base=Int8(), rank=8, out=place / "moved", calibration=text)
    train(place / "moved", place / "again", by=0.1)
    return place


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, kind in FAMILIES.items() if "float" in kind().bases])
def test_every_family_belongs_on_its_own_base(place, tmp_path, name):
    options = {"waveft": {"n_frequency": 64}, "c3a": {"block_size": 16}, "road": {"group_size": 16}}
    family = FAMILIES[name](**options.get(name, {}))
    if "bitsandbytes" not in str(family.bases) and len(family.bases) < 2:
        pytest.skip("it has no quantized base")
    rank = {} if family.default_rank is None else {"rank": 4}
    try:
        init(str(place / "model"), out=str(tmp_path / "a"), family=family, **rank, **FAST)
    except ConfigurationError as error:
        pytest.skip(str(error))
    assert check(tmp_path / "a", base=place / "model").layers == 14
    quailora.load(tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if "layers.1.mlp.down_proj" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError):
        quailora.load(tmp_path / "a", any_base=True)


def test_what_is_read_is_not_replaced(place, tmp_path, tiny_llama):
    init(str(tiny_llama), out=str(tmp_path / "a"), save_base=True, quantizer=quailora.Uniform(4, 32), **SMALL)
    before = (tmp_path / "a/base/model.safetensors").read_bytes()
    refused = "in it is read and would be replaced"
    with pytest.raises(OutputExistsError, match=refused):
        init(
            str(tiny_llama),
            base=str(tmp_path / "a/base"),
            out=str(tmp_path / "a"),
            overwrite=True,
            quantizer=None,
            **SMALL,
        )
    assert (tmp_path / "a/base/model.safetensors").read_bytes() == before
    for function, options in ((convert, {}), (merge_full, {}), (rebase, {"base": Int8()})):
        given = [place / "trained"] if function is merge_full else place / "trained"
        with pytest.raises(OutputExistsError):
            function(given, out=place / "trained", overwrite=True, **options) if function is not rebase else function(
                given, out=quailora.Output(place / "trained", overwrite=True), **options
            )
    assert (place / "trained/adapter_model.safetensors").exists()


def test_other_files_beside_a_merged_model_stay(place, tmp_path):
    merge_full([place / "trained"], out=tmp_path / "merged")
    merge_full([place / "trained"], out=tmp_path / "merged", overwrite=True)
    (tmp_path / "merged/scores.txt").write_text("0.5", encoding="utf-8")
    with pytest.raises(OutputExistsError, match=r"more than a model, scores\.txt among it"):
        merge_full([place / "trained"], out=tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged/scores.txt").exists()


def test_a_link_in_place_of_the_base_is_replaced(tmp_path):
    """What it leads to stays."""
    old, new, elsewhere = tmp_path / "out", tmp_path / "new", tmp_path / "elsewhere"
    for folder in (old, new / "base", elsewhere):
        folder.mkdir(parents=True)
    (elsewhere / "weights").write_text("mine", encoding="utf-8")
    (old / "base").symlink_to(elsewhere)
    (old / "notes.txt").write_text("mine", encoding="utf-8")
    (new / "base/weights").write_text("new", encoding="utf-8")
    outputs.fill(old, new)
    assert (old / "base/weights").read_text(encoding="utf-8") == "new"
    assert (elsewhere / "weights").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in old.iterdir()) == ["base", "notes.txt"]


def test_an_earlier_training_counts_once(place, tmp_path):
    """In an adapter that was moved and trained again, whose start holds the first training."""
    combine([place / "again"], out=tmp_path / "both")
    models = [AutoModelForCausalLM.from_pretrained(place / "model") for _ in range(2)]
    adapters = (place / "again", tmp_path / "both")
    found, expected = (
        effective_weights(PeftModel.from_pretrained(model, str(adapter)))
        for model, adapter in zip(models, adapters, strict=True)
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def trained_by_peft(place, folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def test_what_cannot_be_combined_is_refused(place, tmp_path):
    """Tokens that one adapter trains; and layers that only one leaves out are not lost."""
    options = {"on": "full precision", "initial": "zero", "model": place / "model"}
    tokens = trained_by_peft(place, tmp_path / "tokens", trainable_token_indices=[5, 6])
    with pytest.raises(ConfigurationError, match=r"got .*token.*, which cannot be weighed"):
        combine([tokens], out=tmp_path / "both", **options)
    parts = [
        trained_by_peft(place, tmp_path / "less", exclude_modules=["model.layers.0.self_attn.q_proj"]),
        trained_by_peft(place, tmp_path / "first", layers_to_transform=[0]),
        trained_by_peft(place, tmp_path / "whole"),
    ]
    combine(parts, out=tmp_path / "both", **options)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), str(tmp_path / "both"))
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 2


def test_an_adapter_that_acts_on_some_tokens_is_not_merged(place, tmp_path):
    adapter = trained_by_peft(place, tmp_path / "alora", alora_invocation_tokens=[1, 2])
    with pytest.raises((ConfigurationError, ModelError)):
        merge_full([adapter], out=tmp_path / "merged", initial="zero", model=place / "model")
    assert not (tmp_path / "merged").exists()


def test_a_model_of_float16_is_merged_in_float16(place, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    adapter = trained_by_peft(place, tmp_path / "a")
    done = merge_full([adapter], out=tmp_path / "merged", initial="zero", model=tmp_path / "half")
    assert done.dtype == "float16"
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    done = merge_full(
        [adapter], out=tmp_path / "two", initial="zero", model=tmp_path / "half", resources=Resources(dtype="float32")
    )
    assert done.dtype == "float32"


def test_a_relative_path_that_means_another_model_is_found_out(place, tmp_path, tokenizer, monkeypatch):
    """The adapter notes the path that was typed, and here another model lies there."""
    (tmp_path / "A").mkdir()
    (tmp_path / "B").mkdir()
    save_llama(tmp_path / "A/m", tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "A/m")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.05)
    other.save_pretrained(tmp_path / "B/m")
    tokenizer.save_pretrained(tmp_path / "B/m")
    monkeypatch.chdir(tmp_path / "A")
    init("m", out="start", rank=4, **FAST)
    train(tmp_path / "A/start", tmp_path / "A/trained")
    monkeypatch.chdir(tmp_path / "B")
    with pytest.raises(ModelError, match="was not made for"):
        merge_full(["../A/trained"], out="merged")
    monkeypatch.chdir(tmp_path / "A")
    merge_full(["trained"], out="merged")


def test_a_folder_by_the_name_of_the_demo_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    resolve("demo")
    (tmp_path / "demo/config.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"Write \./demo for the folder"):
        resolve("demo")


def test_scores_of_tasks_have_their_metric_by_name():
    """Whatever the filter, as in gsm8k, which has two."""
    assert score_in("gsm8k", {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match,flexible": 0.5}) == 0.25
    assert score_in("arc", {"acc,none": 0.25, "acc_norm,none": 0.5, "acc_stderr,none": 0.1}) == 0.5
    with pytest.raises(ConfigurationError, match="as a metric of the task 'summary', got bleu"):
        score_in("summary", {"bleu,none": 3.0})
