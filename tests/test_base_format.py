"""Bases written in AutoAWQ's format, which vLLM reads with any zero points."""

from __future__ import annotations

import json

import pytest
import torch
from families import make_model, save_llama
from helpers import init
from safetensors.torch import load_file
from trainings import train

from quailora import (
    GPTQ,
    NF4,
    Calibration,
    Optimal,
    Output,
    Quantizer,
    StoredBase,
    Uniform,
    initialize_model,
    merge,
    rebase,
)
from quailora.bases.awq import awq_config, awq_tensors, read_awq
from quailora.errors import ConfigurationError
from quailora.evaluation.check import check
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.training import MergeTraining
from quailora.testing import make_problem

FAST = {"solver": Optimal(), "rank": 4, "samples": 4, "sequence_length": 64, "save_base": True}
STATIC = GPTQ(group_size=16, activation_order=True, static_groups=True)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("model"), tokenizer, num_key_value_heads=2)


@pytest.mark.parametrize("quantizer", [Uniform(), Uniform(group_size=None), Uniform(symmetric=True), STATIC], ids=repr)
def test_what_is_written_is_read_again(quantizer):
    """Codes, scales and zero points, through the reader that packing by hand has tested."""
    problem = make_problem(64, 128)
    stored = quantizer.quantize(problem.weight, problem.statistics)
    packed = stored.packed()
    found = read_awq(awq_tensors(packed), awq_config({"layer": packed}), torch.float32)
    assert found.digest == stored.digest
    torch.testing.assert_close(found.dequantize(), stored.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", [GPTQ(bits=3), GPTQ(group_size=16, activation_order=True), Uniform(4, 48)])
def test_layers_that_do_not_fit_are_refused(quantizer):
    problem = make_problem(64, 128)
    packed = quantizer.quantize(problem.weight, problem.statistics).packed()
    with pytest.raises(ConfigurationError, match=r"4 bits in groups of consecutive columns, all of one size, got"):
        awq_tensors(packed)


def test_layers_have_one_group_size():
    packed = {str(size): Uniform(group_size=size).quantize(torch.randn(8, 64)).packed() for size in (16, 32)}
    with pytest.raises(ConfigurationError, match=r"one group size for all layers, got 2, 4|got 16, 32"):
        awq_config(packed)
    wide = {str(width): Uniform(group_size=None).quantize(torch.randn(8, width)).packed() for width in (32, 64)}
    assert awq_config(wide)["group_size"] == -1


@pytest.mark.parametrize("quantizer", [Uniform(group_size=32), STATIC], ids=repr)
def test_a_base_is_the_same_in_both_formats(quantizer, model, tmp_path):
    """Its adapter belongs on either."""
    for name in ("auto", "awq"):
        init(str(model), out=str(tmp_path / name), quantizer=quantizer, base_format=name, **FAST)
    bases = {name: StoredBase(str(tmp_path / name / "base")) for name in ("auto", "awq")}
    assert bases["awq"].config["quant_method"] == "awq"
    assert bases["awq"].config["group_size"] == quantizer.group_size
    assert bases["awq"].layers == bases["auto"].layers
    for layer in bases["auto"].layers:
        first, second = (bases[name].weight(layer, torch.float32) for name in ("auto", "awq"))
        assert first.digest == second.digest
    for name in ("auto", "awq"):
        assert check(str(tmp_path / "auto"), base=str(tmp_path / name / "base")).layers == 14
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("auto", "awq"))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (NF4(), r"uniform levels of 4 bits, as `GPTQ` and `Uniform` make them, got NF4"),
        (Uniform(3), r"uniform levels of 4 bits.*got Uniform\(bits=3"),
        (GPTQ(activation_order=True), r"Pass `static_groups`, too"),
        (Uniform(group_size=48), r"whose inputs are whole groups, and model\.layers\.0.* is not such a layer"),
    ],
    ids=repr,
)
def test_a_quantizer_that_does_not_fit_is_refused_before_anything_is_computed(
    quantizer: Quantizer, message, model, tmp_path, monkeypatch
):
    monkeypatch.setattr("quailora.pipeline.initialize_model.finished_run", None)
    with pytest.raises(ConfigurationError, match=message):
        init(str(model), out=str(tmp_path / "out"), quantizer=quantizer, base_format="awq", **FAST)
    assert not (tmp_path / "out").exists()


def test_layers_that_transformers_does_not_replace_are_refused(tokenizer, tmp_path):
    """Those of GPT-2 are no `nn.Linear`: they are not written dequantized without a word."""
    other = tmp_path / "model"
    make_model("GPT2").save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigurationError, match=r"and transformer\.h\.0\..* is not such a layer: Conv1D"):
        init(str(other), out=str(tmp_path / "out"), quantizer=Uniform(group_size=16), base_format="awq", **FAST)


def test_a_result_in_memory_is_written_so(model, tmp_path):
    result = initialize_model(
        str(model), "best-joint", Calibration(samples=4, sequence_length=64), base=GPTQ(group_size=32)
    )
    result.save(tmp_path / "out", base_format="awq")
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "awq"


def test_a_merged_model_is_the_same_in_both_formats(model, tmp_path):
    """Its card says what loads it."""
    init(str(model), out=str(tmp_path / "start"), rank=4, samples=4, sequence_length=64, solver=Optimal())
    train(tmp_path / "start", tmp_path / "trained", by=1.0)
    options = {
        "calibration": Calibration(samples=4, sequence_length=64),
        "texts": EvaluationTexts(windows=0),
        "training": MergeTraining.none(),
    }
    for name in ("auto", "awq"):
        merge(tmp_path / "trained", GPTQ(group_size=32), out=Output(tmp_path / name, base_format=name), **options)
    first, second = (StoredBase(str(tmp_path / name)) for name in ("auto", "awq"))
    assert second.config["quant_method"] == "awq"
    for layer in first.layers:
        assert first.weight(layer, torch.float32).digest == second.weight(layer, torch.float32).digest
    cards = [(tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("auto", "awq")]
    assert "vLLM takes this format only" in cards[0]
    assert "vLLM loads it as it is" in cards[1]
    with pytest.raises(ConfigurationError, match=r"uniform levels of 4 bits.* got NF4"):
        merge(tmp_path / "trained", NF4(), out=Output(tmp_path / "other", base_format="awq"), **options)


@pytest.mark.parametrize("base", [GPTQ(group_size=32), Uniform(group_size=32)], ids=repr)
def test_a_moved_adapter_has_its_base_in_that_format(base, model, tmp_path):
    init(str(model), out=str(tmp_path / "start"), rank=4, samples=4, sequence_length=64, solver=Optimal())
    train(tmp_path / "start", tmp_path / "trained", by=1.0)
    given = {"calibration": Calibration(samples=4, sequence_length=64)}
    rebase(tmp_path / "trained", base=base, out=Output(tmp_path / "moved", base_format="awq"), **given)
    written = StoredBase(str(tmp_path / "moved" / "base"))
    assert written.config["quant_method"] == "awq"
    assert check(str(tmp_path / "moved"), base=written.name).layers == 14
    for other in (GPTQ(bits=3, group_size=32), Uniform(bits=3, group_size=32)):
        with pytest.raises(ConfigurationError, match=r"uniform levels of 4 bits"):
            rebase(tmp_path / "trained", base=other, out=Output(tmp_path / "other", base_format="awq"), **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "start", "trained"]
