"""Plans of models with layers that no adapter can have, of other models, and of measurements that were made before."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import save_llama
from helpers import init
from safetensors.torch import load_file

import quailora
from quailora import NF4, Calibration, Resources, TextSource, Uniform
from quailora.budget import costs, measuring
from quailora.budget.choices import Choice, column_bytes, possible_choices
from quailora.budget.measure_choices import measure_choices
from quailora.budget.measurements import Measurements
from quailora.budget.plan import BudgetPlan
from quailora.budget.planning import Planner
from quailora.calibration.tokens import CalibrationTokens
from quailora.cli.main import main
from quailora.errors import ConfigurationError, QuailoraError, TargetError
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import empty_model, load_model
from quailora.pipeline.checkpoint import open_checkpoint

RUN = ["--samples", "8", "--sequence-length", "32"]
TEXT = Calibration(TextSource(), 8, 32)
FEW = possible_choices("gptq", (2, 4, 16), (0, 2), (32,))


@pytest.fixture(scope="module", autouse=True)
def few_passes():
    """As many as show that all of them count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "PASSES", 4)
        yield


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """A plan from the terminal."""
    out = tmp_path_factory.mktemp("plan") / "plan"
    words = ["--bits", "2", "4", "16", "--ranks", "0", "2", "4", "--budget", "6bits"]
    assert main(["plan", str(tiny_llama), "--out", str(out), *RUN, *words]) == 0
    return out


@pytest.fixture(scope="module")
def mamba(tokenizer, tmp_path_factory):
    """A model in which PEFT has no adapter for two of four linear layers, because their code reads the weight."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "state_size": 16, "time_step_rank": 32, "intermediate_size": 128}
    place = tmp_path_factory.mktemp("mamba")
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_folder_with_other_files_keeps_them(tiny_llama, tmp_path):
    """Also if nothing was measured, or what was there is to be forgotten."""
    (tmp_path / "run-of-mine").mkdir()
    (tmp_path / "thesis.txt").write_text("It took years.", encoding="utf-8")
    batch = {"input_ids": torch.full((8, 32), 10**6)}  # which the model does not know
    with pytest.raises(QuailoraError, match="1000000"):
        measure_choices(str(tiny_llama), [batch], choices=FEW, state=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"run-of-mine", "thesis.txt"}
    open_checkpoint(tmp_path, {"model": "one"}, fresh=False)
    open_checkpoint(tmp_path, {"model": "another"}, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"run-of-mine", "thesis.txt"}
    assert len(list(tmp_path.glob("run-*"))) == 2  # that of the first one is gone


def test_layers_that_were_not_measured_stay_in_full_precision(mamba, tmp_path):
    """Their bytes count as such, and nobody knows what their errors cost."""
    words = ["--budget", "6bits", "--bits", "4", "8", "--ranks", "2", "4"]
    assert main(["plan", str(mamba), "--out", str(tmp_path / "p"), *RUN, *words]) == 0
    plan = BudgetPlan.read(tmp_path / "p")
    model = empty_model(str(mamba))
    layers = linear_layers(model)
    assert plan.others
    assert plan.layers.keys() | plan.others.keys() == layers.keys()
    assert {layer.choice for layer in plan.others.values()} == {Choice(None)}
    every = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    measured = {name: layers[name] for name in plan.layers}
    own = sum(layer.weight.numel() * layer.weight.element_size() for layer in measured.values())
    assert plan.other_bytes == every - own + 4 * sum(layer.shape[1] for layer in measured.values())
    assert main(["init", str(mamba), "--plan", str(tmp_path / "p"), "--out", str(tmp_path / "a"), *RUN]) == 0
    stored = load_file(tmp_path / "a/base/model.safetensors")
    assert {name for name in layers if f"{name}.qweight" in stored} == plan.layers.keys()
    assert all(f"{name}.weight" in stored for name in plan.others)


def test_a_stock_base_has_them_in_4_bits(mamba, tmp_path):
    """As bitsandbytes makes it, and in no list of layers, so that it is not written."""
    words = ["--budget", "8bits", "--bits", "4", "--ranks", "2", "4", "--format", "bitsandbytes"]
    assert main(["plan", str(mamba), "--out", str(tmp_path / "p"), *RUN, *words]) == 0
    plan = BudgetPlan.read(tmp_path / "p")
    assert {layer.choice for layer in plan.others.values()} == {Choice(NF4())}
    assert plan.quantizers == {}
    assert main(["init", str(mamba), "--plan", str(tmp_path / "p"), "--out", str(tmp_path / "a"), *RUN]) == 0
    assert not (tmp_path / "a/base").exists()


def test_a_plan_of_another_model_is_refused(tokenizer, folder, tiny_llama, tmp_path, capsys):
    """It may have all layers of the plan and more, or the same ones in another size; or the plan has lost some."""
    options = {"intermediate_size": 96, "num_key_value_heads": 2}
    larger = save_llama(tmp_path / "larger", tokenizer, num_hidden_layers=3, **options)
    wider = save_llama(tmp_path / "wider", tokenizer, **{**options, "intermediate_size": 128})
    for model, first in ((larger, "model.layers.2.self_attn.q_proj"), (wider, "model.layers.0.mlp.gate_proj")):
        assert main(["init", str(model), "--plan", str(folder), "--out", str(tmp_path / "a"), *RUN]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "plan does not know" in said
        assert first in said
    content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    del content["layers"]["model.layers.1.mlp.up_proj"]
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TargetError, match=r"does not know 1 of the 14 linear layers .* model\.layers\.1\.mlp\.up_proj"):
        init(str(tiny_llama), out=str(tmp_path / "a"), plan=str(tmp_path), quantizer=None)


def test_a_layer_that_some_choices_do_not_fit_can_have_others(tokenizer, tmp_path, capsys):
    """Keys and values are 16 wide: too few for codes of 3 bits, and for rank 32."""
    model = save_llama(tmp_path / "model", tokenizer, num_key_value_heads=1)
    words = ["plan", str(model), "--out", str(tmp_path / "p"), *RUN]
    assert main([*words, "--budget", "20bits", "--bits", "3", "4", "16", "--ranks", "0", "2"]) == 0
    small = [layer for name, layer in BudgetPlan.read(tmp_path / "p").layers.items() if name.endswith("k_proj")]
    assert all(layer.choice.bits > 3 for layer in small)
    planner = Planner(Measurements.read(tmp_path / "p"))
    three = next(choice for choice in planner.choices if choice.bits == 3)
    assert planner.nbytes_of(three) == float("inf")
    assert all("3 bits" not in point.uniform_title for point in planner.frontier())
    with pytest.raises(ConfigurationError, match="some layers can have none of these choices"):
        planner.within(1e9, "much", [three])
    out = ["plan", str(model), "--out", str(tmp_path / "q"), *RUN, "--budget", "20bits"]
    for more in (["--bits", "3", "--ranks", "2", "4"], ["--bits", "2", "4", "--ranks", "32"]):
        assert main([*out, *more]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "None of the choices is possible for 4 of the 14 layers, model.layers.0.self_attn.k_proj" in said
    assert not (tmp_path / "q").exists()


def test_the_base_of_best_is_that_of_the_quantizer(tiny_llama, monkeypatch):
    """Without an adapter, layers of the reference network are what bitsandbytes makes, and make up for nothing."""
    found = {}
    original = measuring.stored_errors

    def watched(inputs, *arguments):
        stored = original(inputs, *arguments)
        found[inputs.layer.name] = inputs.layer.weight.clone(), stored
        return stored

    monkeypatch.setattr(measuring, "stored_errors", watched)
    choices = possible_choices("bitsandbytes", (4,), (0, 4))
    measured = measure_choices(str(tiny_llama), TEXT, choices=choices, around="4.2bits")
    assert (measured.recipe, measured.reference.rank) == ("best", 0)
    assert len(found) == 14
    for weight, stored in found.values():
        torch.testing.assert_close(stored.dequantized, NF4().quantize(weight).dequantize(), rtol=0, atol=1e-6)


def test_full_precision_counts_in_the_dtype_in_which_it_is_written(tiny_llama, folder, tmp_path):
    """The weights of this model are float32, and float16 ones become that on a CPU."""
    plan = BudgetPlan.read(folder)
    kept = replace(
        Planner(Measurements.read(folder)).of_budget("17bits"), file=None
    )  # enough for some layers of 32 bits
    assert any(layer.choice.quantizer is None for layer in kept.layers.values())
    kept.write(tmp_path / "plan.json")
    assert main(["init", str(tiny_llama), "--plan", str(tmp_path), "--out", str(tmp_path / "a"), *RUN]) == 0
    stored = load_file(tmp_path / "a/base/model.safetensors")
    ranks = {name: layer.choice.rank for name, layer in kept.layers.items()}
    shapes = {name: layer.shape for name, layer in linear_layers(empty_model(str(tiny_llama))).items()}
    nbytes = {name: 2 * rank * sum(shapes[name]) for name, rank in ranks.items()}
    order = 0
    for key, tensor in stored.items():
        name, _, part = key.rpartition(".")
        if part == "g_idx":
            order += tensor.numel() * 4
        elif name in nbytes:
            nbytes[name] += tensor.numel() * tensor.element_size()
    assert nbytes == {name: layer.nbytes for name, layer in kept.layers.items()}
    whole = sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) + sum(
        2 * rank * sum(shapes[name]) for name, rank in ranks.items()
    )
    unused = sum(4 * shapes[name][1] for name, layer in kept.layers.items() if layer.choice.quantizer is None)
    assert whole == kept.nbytes + kept.other_bytes - unused
    assert order > 0
    assert plan.other_bytes == kept.other_bytes
    half = tmp_path / "half"
    loaded = load_model(str(tiny_llama), "float16")
    loaded.model.save_pretrained(half)
    loaded.tokenizer.save_pretrained(half)
    found = measure_choices(str(half), TEXT, choices=FEW, around="6bits", resources=Resources(device="cpu"))
    assert found.other_bytes == measure_choices(str(tiny_llama), TEXT, choices=FEW, around="6bits").other_bytes
    with pytest.raises(ConfigurationError, match="The smallest choice takes"):
        measure_choices(str(half), TEXT, choices=FEW, around=f"{found.other_bytes}B", resources=Resources(device="cpu"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_are_those_of_the_checkpoint(symmetric):
    """Zero points of symmetric levels among them. The order of the columns is counted apart."""
    module = torch.nn.Linear(192, 64)
    layers = {"layer": Layer("layer", module)}
    choices = possible_choices("gptq", (2, 3, 4, 8), (0,), (32, 64), symmetric=symmetric)
    for choice in choices:
        packed = choice.quantizer.quantize(module.weight.detach()).packed()
        written = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        assert choice.nbytes(layers["layer"]) + column_bytes(choices, layers) == written


def test_measurements_are_chosen_from(tiny_llama, folder, tmp_path, capsys):
    """By bits and ranks; what says how to measure is refused, as nothing is measured."""
    words = ["plan", str(tiny_llama), "--measurements", str(folder), "--out", str(tmp_path / "p"), "--overwrite"]
    assert main([*words, "--budget", "7bits", "--bits", "2", "4", "--ranks", "2", "4"]) == 0
    plan = BudgetPlan.read(tmp_path / "p")
    assert {layer.choice.bits for layer in plan.layers.values()} <= {2, 4}
    assert {layer.choice.rank for layer in plan.layers.values()} <= {2, 4}
    assert "16-bit skips alone -" not in capsys.readouterr().out
    assert main([*words, "--quality", "10", "--ranks", "4"]) == 0
    assert {layer.choice.rank for layer in BudgetPlan.read(tmp_path / "p").layers.values()} <= {4}
    refused = [
        (["--bits", "4", "8"], "Expected bits and ranks that were measured, which are [2, 4, 16] and [0, 2, 4]"),
        (["--ranks", "64"], "Expected bits and ranks that were measured"),
        (["--bits", "16"], "Expected a choice that quantizes layers"),
        (["--recipe", "best", "--format", "bitsandbytes"], "got format, recipe as well"),
        (["--calibration", "text.txt", "--seed", "3"], "got calibration, seed as well"),
    ]
    for more, message in refused:
        assert main([*words, "--budget", "7bits", *more]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_other_files_in_the_folder_of_a_plan_stay(tiny_llama, folder, tmp_path):
    """Also in the folder that a measurement keeps its state in."""
    (tmp_path / "p/measuring").mkdir(parents=True)
    mine = tmp_path / "p/measuring/notes.txt"
    mine.write_text("Mine.", encoding="utf-8")
    words = ["plan", str(tiny_llama), "--out", str(tmp_path / "p"), "--budget", "6bits"]
    assert main([*words, "--measurements", str(folder)]) == 0
    assert mine.exists()
    assert main([*words, *RUN, "--bits", "4", "--ranks", "2", "4", "--overwrite"]) == 0
    assert mine.read_text(encoding="utf-8") == "Mine."


def test_measurements_of_another_model_are_refused(tokenizer, folder, tmp_path, capsys):
    options = {"intermediate_size": 96, "num_key_value_heads": 2}
    words = ["--measurements", str(folder), "--budget", "7bits", "--out", str(tmp_path / "p")]
    for name, more in (("larger", {"num_hidden_layers": 3}), ("wider", {"intermediate_size": 128})):
        model = save_llama(tmp_path / name, tokenizer, **options | more)
        assert main(["plan", str(model), *words]) == 1
        assert "which has other layers than" in " ".join(capsys.readouterr().err.split())
    model = save_llama(tmp_path / "same", tokenizer, **options)
    assert main(["plan", str(model), *words]) == 0


def test_a_plan_without_adapters_says_how_to_have_some(tiny_llama, folder, tmp_path, capsys):
    """The command that comes next is one that works."""
    words = ["plan", str(tiny_llama), "--measurements", str(folder), "--out", str(tmp_path / "p")]
    assert main([*words, "--budget", "6bits", "--ranks", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Next: quailora plan" in said
    assert "RANKS_ABOVE_0" in said
    with pytest.raises(ConfigurationError, match="Plan with ranks above 0 only"):
        BudgetPlan.read(tmp_path / "p").method()


def test_a_family_of_other_adapters_is_refused(tiny_llama, folder, tmp_path, capsys):
    """A plan counts the bytes of LoRA, and its ranks are those of LoRA."""
    words = ["init", str(tiny_llama), "--plan", str(folder), "--out", str(tmp_path / "a"), *RUN]
    assert main([*words, "--family", "loha"]) == 1
    assert "got the family loha as well" in " ".join(capsys.readouterr().err.split())


def test_a_measurement_that_has_lost_a_layer_makes_it_again(tiny_llama, tmp_path):
    """Also one of a block that was finished long ago."""
    first = measure_choices(str(tiny_llama), TEXT, choices=FEW, state=tmp_path)
    lost = next(iter(tmp_path.rglob("layers/model.layers.0.mlp.down_proj.safetensors")))
    lost.write_bytes(lost.read_bytes()[:-1] + b"?")
    again = measure_choices(str(tiny_llama), TEXT, choices=FEW, state=tmp_path)
    assert (again.layers, again.divergence) == (first.layers, first.divergence)


def test_a_measurement_depends_on_all_that_changes_it(tiny_llama, tmp_path):
    """On the arithmetic of the calibration as well; and a model in memory may have changed."""
    model = load_model(str(tiny_llama)).model.train()
    with pytest.raises(ConfigurationError, match="got a model in memory"):
        quailora.measure_choices(model, TEXT, choices=FEW, state=tmp_path)
    quailora.measure_choices(model, TEXT, choices=FEW)
    assert model.training
    measure_choices(str(tiny_llama), replace(TEXT, dtype="model"), choices=FEW, state=tmp_path)
    with pytest.raises(QuailoraError, match='calibration_dtype: "model" then, "bfloat16" now'):
        measure_choices(str(tiny_llama), replace(TEXT, dtype="bfloat16"), choices=FEW, state=tmp_path)


def test_a_quantizer_of_one_format_has_its_bits():
    assert [Choice(None).bits, Choice(NF4()).bits, Choice(Uniform(3, 64), 4).bits] == [16, 4, 3]


def test_batches_of_many_lengths_are_measured(tiny_llama):
    """As a loader has them whose padding is cut off; pieces of held-out text have one length."""
    sizes = (200, 120, 200, 200, 80, 90, 100, 110, 90, 80, 70, 60)
    ids = torch.zeros(len(sizes), max(sizes), dtype=torch.long)
    for row, size in enumerate(sizes):
        ids[row, :size] = torch.arange(size) % 250 + 1
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    tokens = CalibrationTokens.of_batches([batch])
    pieces = costs.held_out_pieces(tokens)
    held_out = sum(sizes[3::4])
    assert held_out / 2 <= pieces.numel() <= held_out
    measured = quailora.measure_choices(str(tiny_llama), [batch], choices=FEW)
    assert measured.divergence > 0
