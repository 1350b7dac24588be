"""Budget plans: the programme against brute force, the errors it works on, and plans from the terminal to the base."""

from __future__ import annotations

import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
import yaml
from families import save_llama
from helpers import evaluate, init
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from runs import Killed
from safetensors.torch import load_file, save_file

import quailora
from quailora import NF4, Calibration, InputStatistics, Resources, StoredBase, TextSource, Uniform
from quailora.budget import costs, measuring
from quailora.budget.choices import Choice, possible_choices
from quailora.budget.layer_errors import RoundingError, quantizers_of, rounding_errors
from quailora.budget.made_up import later_layers, shares_left
from quailora.budget.measurements import MeasuredLayer, Measurements
from quailora.budget.plan import Budget, BudgetPlan
from quailora.budget.planning import Planner
from quailora.budget.programme import cheapest, silenced
from quailora.budget.question import Question
from quailora.calibration.gradients import weight_gradient
from quailora.cli.main import main
from quailora.errors import ConfigurationError, DoesNotFitError, ModelError
from quailora.evaluation.check import check
from quailora.evaluation.scores import measure
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import RECIPES, resolved_name
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.pipeline.store import MemoryStore, StoredLayer
from quailora.schedules.held_out import roundings
from quailora.support.settings import describe

CHOICES = possible_choices("gptq", (2, 4, 16), (0, 4, 8))
NUMBERS = st.floats(0.0, 9.0, width=32)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def brute_force(costs, sizes, budget):
    """The least cost over all choices, and infinity if none fits."""
    layers, choices = costs.shape
    found = [
        costs[range(layers), chosen].sum()
        for chosen in map(list, itertools.product(range(choices), repeat=layers))
        if sizes[range(layers), chosen].sum() <= budget
    ]
    return min(found, default=np.inf)


@settings(max_examples=60)
@given(data=st.data(), shape=SHAPES)
def test_the_programme_finds_what_trying_everything_finds(data, shape):
    """Or says that nothing fits."""
    costs, sizes = (data.draw(arrays(float, shape, elements=NUMBERS)) for _ in range(2))
    budget = data.draw(st.floats(0.5, 20.0))
    best = brute_force(costs, sizes, budget * (1 - 1e-6))
    if np.isinf(best):
        if np.isinf(brute_force(costs, sizes, budget * (1 + 1e-5))):
            with pytest.raises(ConfigurationError, match="the smallest takes"):
                cheapest(costs, sizes, budget)
        return
    chosen = cheapest(costs, sizes, budget)
    rows = range(shape[0])
    assert sizes[rows, chosen].sum() <= budget * (1 + 1e-5)
    assert costs[rows, chosen].sum() <= best + 1e-4 * (1 + costs.max())


def test_what_the_solver_prints_by_itself_is_kept_back(capfd):
    """It comes from a library, past Python's own standard output, and what comes after it is printed."""
    with silenced():
        os.write(1, b"HighsMipSolverData")
    os.write(1, b"plan")
    assert capfd.readouterr().out == "plan"


def test_choices_that_a_layer_cannot_have_are_never_taken():
    costs = np.array([[np.inf, 1.0], [0.0, 5.0]])
    assert cheapest(costs, np.ones((2, 2)), 2).tolist() == [1, 0]


def test_why_there_is_no_choice(monkeypatch, caplog):
    """The message names sizes with their unit, layers that belong together, or the time; a solver that stops warns."""
    costs, sizes, kinds = np.array([[1.0, 2.0], [1.0, np.inf]]), np.array([[3.0, 2.0], [3.0, 1.0]]), np.array([0, 1])
    with pytest.raises(ConfigurationError, match=r"smallest takes 5 apples, and the budget leaves 4 apples"):
        cheapest(costs, sizes, 4, amount="{:g} apples".format)
    with pytest.raises(ConfigurationError, match="quantize layers alike"):
        cheapest(costs, sizes, 5, [([0, 1], kinds)])
    milp = scipy.optimize.milp

    def stopped(*arguments, **options):
        result = milp(*arguments, **options)
        result.status, result.mip_gap = 1, 0.02
        return result

    monkeypatch.setattr(scipy.optimize, "milp", stopped)
    assert cheapest(costs, sizes, 6).tolist() == [0, 0]
    assert "may cost 0.02 less" in caplog.text
    with pytest.raises(ConfigurationError, match="in 60 seconds"):
        cheapest(costs, sizes, 5, [([0, 1], kinds)])


def test_layers_that_belong_together_are_quantized_alike():
    """The two would differ without the constraint."""
    costs, sizes = np.array([[0.0, 5.0, 1.0], [9.0, 0.0, 8.0]]), np.array([[4.0, 1.0, 3.0], [4.0, 1.0, 3.0]])
    kinds = np.array([0, 1, 0])
    assert cheapest(costs, sizes, 8).tolist() == [0, 1]
    assert cheapest(costs, sizes, 8, [([0, 1], kinds)]).tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_errors_are_those_of_each_quantizer_less_the_best_adapter(shape):
    """No adapter of the same rank leaves less; the weight of a lower rank is a part of that of the highest."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(shape), torch.randn(400, shape[1]) @ torch.randn(shape[1], shape[1])
    statistics = InputStatistics.from_inputs(inputs)
    choices = possible_choices("gptq", (2, 3, 16), (0, 4, 8, 32))
    every = rounding_errors(weight, statistics, choices, 3)
    for quantizer, found in zip(quantizers_of(choices), every, strict=True):
        error = weight - roundings(quantizer)[3].quantize(weight, statistics).dequantize()
        torch.testing.assert_close(found.left(0), error)
        for rank in (4, 8):
            taken = error - found.left(rank)
            assert torch.linalg.matrix_rank(taken, atol=1e-3) == rank
            values = torch.linalg.svdvals(error @ inputs.T)
            left = (found.left(rank) @ inputs.T).square().sum()
            torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 5])
def test_products_are_those_with_what_is_left(rank):
    torch.manual_seed(0)
    parts = [torch.randn(shape) for shape in ((12, 20), (12, rank), (rank, 20))]
    calls = [(torch.randn(7, 20), torch.randn(7, 12)), (torch.randn(3, 20), torch.randn(3, 12))]
    gradient, kept = weight_gradient(calls), RoundingError(*parts).tensors(3)
    torch.testing.assert_close(gradient, sum(outputs.T @ inputs for inputs, outputs in calls))
    found = RoundingError.read(kept, 3, torch.device("cpu"))
    expected = torch.stack([(found.left(number) * gradient).sum() for number in range(rank + 1)])
    torch.testing.assert_close(found.products(gradient, calls), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 5])
def test_squares_are_those_of_what_is_left(rank):
    torch.manual_seed(0)
    found = RoundingError(*(torch.randn(shape) for shape in ((12, 20), (12, rank), (rank, 20))))
    expected = torch.stack([found.left(number).square().sum() for number in range(rank + 1)])
    torch.testing.assert_close(found.squares(), expected, rtol=1e-4, atol=1e-3)


def test_costs_of_a_rank_are_in_proportion_to_squared_errors():
    """Exactly, after pooling; what was in proportion stays as it was, and nothing mixes ranks."""
    choices = possible_choices("gptq", (3, 4, 16), (0, 4))
    squares = torch.tensor([8.0, 6.0, 2.0, 1.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert [one.title for one in choices][2:6:2] == ["4 bits g64", "4 bits g32"]
    even = squares * torch.tensor([3.0, 5.0, 3.0, 5.0, 3.0, 5.0, 0.0])
    torch.testing.assert_close(costs.pooled(choices, even, squares), even)
    noisy = even * torch.tensor([1.2, 0.9, 1.0, 1.0, 0.8, 1.1, 1.0])
    torch.testing.assert_close(costs.pooled(choices, noisy, squares), even)
    missing = noisy.clone()
    missing[1], squares[3] = torch.inf, 0.0
    found = costs.pooled(choices, missing, squares)
    assert found[1] == torch.inf
    assert found[3] == missing[3]
    torch.testing.assert_close(found[5], missing[5])


def measurements(seed=0, layers=14):
    """Made-up layers of two blocks, in which more bits and higher ranks have smaller errors."""
    generator = np.random.default_rng(seed)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = {}
    for number in range(layers):
        shape = tuple(64 * generator.integers(1, 4, 2))
        sizes = [shape[0] * shape[1] * bits(choice) / 8 + 2 * choice.rank * sum(shape) for choice in CHOICES]
        scale = generator.exponential()
        costs = [0.0 if bits(one) == 16 else scale * 4.0 ** -bits(one) * 0.95**one.rank for one in CHOICES]
        name = f"model.layers.{number // 7}.block.{names[number % 7]}"
        found[name] = MeasuredLayer(shape, tuple(map(round, sizes)), tuple(costs))
    return Measurements("model", {}, CHOICES, Choice(CHOICES[3].quantizer, 4), "best-joint", 0.1, 1000, found, 1.0)


def bits(choice):
    return 16 if choice.quantizer is None else choice.quantizer.bits


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_never_worse_than_what_is_the_same_everywhere(seed):
    """Nor than one quantizer with layers in full precision, in what is expected; and it stays within its bytes."""
    planner = Planner(measurements(seed))
    points = planner.frontier()
    assert len(points) > 5
    assert all(first.plan >= second.plan - 1e-9 for first, second in itertools.pairwise(points))
    for point in points:
        others = [one for one in (point.uniform, point.skipping) if one is not None]
        assert all(point.plan <= one * (1 + 1e-4) for one in others)
        nbytes = point.bits * planner.measurements.weights / 8
        assert planner.within(nbytes * (1 + 1e-4), "").nbytes <= nbytes * (1 + 2e-4)
    assert points[-1].plan == pytest.approx(0, abs=1e-9)


def test_a_plan_of_a_quality_is_the_smallest_one():
    """Asked for the quality of a plan within some bytes, it takes no more of them."""
    planner = Planner(measurements())
    within = planner.within(4.5 * planner.measurements.weights / 8, "4.5bits")
    again = planner.of_quality(within.divergence * (1 + 1e-9))
    assert again.nbytes <= within.nbytes
    assert again.divergence <= within.divergence * (1 + 1e-6)


def test_fused_layers_are_quantized_alike():
    planner = Planner(measurements(), fused=True)
    plan = planner.within(4 * planner.measurements.weights / 8, "4bits")
    for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in range(2):
            found = {plan.layers[f"model.layers.{block}.block.{name}"].choice.quantizer for name in together}
            assert len(found) == 1


def test_costs_add_up_to_the_divergence_of_the_reference():
    """Of which a layer that cannot carry the rank of the reference has the cost of the highest rank that it can."""
    known = measurements()
    layers, name = dict(known.layers), "model.layers.0.block.q_proj"
    at = CHOICES.index(known.reference)
    short = [np.inf if number == at else cost for number, cost in enumerate(layers[name].costs)]
    layers[name] = MeasuredLayer(layers[name].shape, layers[name].nbytes, tuple(short))
    changed = Measurements("m", {}, CHOICES, known.reference, "best-joint", 0.1, 0, layers, 1.0)
    chosen = changed.everywhere(known.reference)
    assert CHOICES[chosen[0]] == Choice(known.reference.quantizer)
    assert set(chosen[1:]) == {at}
    assert changed.expected(list(chosen)) == pytest.approx(0.1)
    assert np.isinf(changed.costs[0, at])


@pytest.mark.parametrize(
    ("text", "expected"), [("3.5bits", 437.5), ("3.5 bits", 437.5), ("2bit", 250), ("2KiB", 1548), ("4kB", 3500)]
)
def test_budgets(text, expected):
    assert Budget(text).nbytes(1000, 500) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["0bits", "three bits", "-1bits", "bits", ""])
def test_budgets_that_cannot_be_meant(text):
    with pytest.raises(ConfigurationError, match="Expected"):
        Budget(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gptq", (5,), (0,)), "among 2, 3, 4, 8, 16 for a base of gptq"),
        (("bitsandbytes", (8,), (0,)), "among 4, 16 for a base of bitsandbytes"),
        (("gptq", (4,), ()), "ranks of 0 or more"),
        (("gptq", (4,), (-1,)), "ranks of 0 or more"),
        (("gptq", (16,), (0,)), "nothing to plan"),
        (("hqq", (4,), (0,)), "a format"),
        (("gptq", (4,), (0,), ()), "sizes of groups"),
        (("gptq", (4,), (0,), (64, 0)), "sizes of groups"),
    ],
)
def test_choices_that_no_checkpoint_holds(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        possible_choices(*arguments)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((64, 32), ["2 bits g32", "3 bits g64", "4 bits g64", "4 bits g32", "8 bits"]),
        ((16,), ["2 bits g16", "3 bits g16", "4 bits g16", "8 bits"]),
        ((32, 128, 128), ["2 bits g32", "3 bits g128", "4 bits g128", "4 bits g32", "8 bits"]),
    ],
)
def test_sizes_of_groups(asked, expected):
    assert [one.base for one in possible_choices("gptq", (2, 3, 4, 8), (0,), asked)] == expected


def test_there_is_nothing_to_choose_among_one():
    with pytest.raises(ConfigurationError, match="Expected two choices"):
        Question((Choice(Uniform(4)),), Choice(Uniform(4)))


FAST = ["--samples", "16", "--sequence-length", "32", "--ranks", "1", "4", "--bits", "2", "3", "4", "16"]


@pytest.fixture(scope="module", autouse=True)
def few_passes():
    """As many as show that all of them count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "PASSES", 12)
        yield


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """A plan from the terminal."""
    out = tmp_path_factory.mktemp("plan") / "plan"
    assert main(["plan", str(tiny_llama), "--budget", "5.5bits", "--out", str(out), *FAST, "--group-sizes", "32"]) == 0
    return out


def test_a_plan_becomes_a_base_and_an_adapter(tiny_llama, folder, tmp_path, capsys):
    """With the bytes that were planned, and the command of its `config.yaml` gives the same."""
    plan = BudgetPlan.read(folder)
    assert plan.bits <= 5.5
    assert {layer.choice.base for layer in plan.layers.values()} > {"4 bits g32"}
    run = ["--samples", "8", "--sequence-length", "32"]
    assert (
        main(["init", str(tiny_llama), "--plan", str(folder), "--out", str(tmp_path / "a"), "--alpha", "32", *run]) == 0
    )
    base = StoredBase(str(tmp_path / "a/base"))
    report = json.loads((tmp_path / "a/report.json").read_text(encoding="utf-8"))
    ranks = {layer["name"]: layer["rank"] for layer in report["layers"]}
    nbytes = 0
    for name, layer in plan.layers.items():
        rows, columns = layer_shape(tiny_llama, name)
        nbytes += 2 * layer.choice.rank * (rows + columns)
        assert ranks.get(name, 0) == layer.choice.rank
        if layer.choice.quantizer is None:
            assert name not in base.layers
            nbytes += 2 * rows * columns
        else:
            stored = base.weight(name, torch.float32)
            nbytes += stored.nbytes
            assert stored.bits == layer.choice.quantizer.bits
    assert nbytes == pytest.approx(plan.nbytes, rel=0.01)
    shapes = {name: layer_shape(tiny_llama, name) for name in plan.layers}
    adapter = sum(2 * ranks.get(name, 0) * sum(shape) for name, shape in shapes.items())
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert report["bits_per_weight"] == pytest.approx(8 * (nbytes - adapter) / weights, rel=0.01)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text(encoding="utf-8"))
    scales = {config["lora_alpha"] / config["r"]}
    scales |= {config["alpha_pattern"][name] / rank for name, rank in config["rank_pattern"].items()}
    assert scales == {2.0}
    options = yaml.safe_load((tmp_path / "a/config.yaml").read_text(encoding="utf-8"))
    assert options["plan"] == str(folder / "plan.json")
    assert main(["init", "--config", str(tmp_path / "a/config.yaml"), "--out", str(tmp_path / "b")]) == 0
    for name in ("adapter_model.safetensors", "base/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_blocks_of_a_plan_are_trained(tiny_llama, folder, tmp_path, monkeypatch):
    """Layers without an adapter among them, which count in the size that is said before and after."""
    content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    bare = [f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.gate_proj")]
    for name in bare:
        content["layers"][name] |= {"quantizer": describe(Uniform(2, 32)), "rank": 0}
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    blocks = BlockTraining(20, 256, scale_rate=1e-3, factor_rate=3e-4, parts=("scales", "factors"))
    monkeypatch.setitem(RECIPES, "block-trained-joint", replace(RECIPES["block-trained-joint"], blocks=blocks))
    options = {"quantizer": None, "plan": str(tmp_path / "plan.json"), "samples": 64, "sequence_length": 64}
    bits = set()
    for recipe in ("best-joint", "block-trained-joint"):
        init(str(tiny_llama), out=str(tmp_path / recipe), recipe=recipe, calibration_dtype="model", **options)
        report = json.loads((tmp_path / recipe / "report.json").read_text(encoding="utf-8"))
        bits.add(round(report["bits_per_weight"], 6))
    before, after = (StoredBase(str(tmp_path / recipe / "base")) for recipe in ("best-joint", "block-trained-joint"))
    for name in bare:
        first, second = (base.weight(name, torch.float32) for base in (before, after))
        assert second.bits == 2
        assert not torch.equal(first.dequantize(), second.dequantize())
    shares = {layer["name"]: layer["block_error_trained"] / layer["block_error"] for layer in report["layers"]}
    assert not shares.keys() & set(bare)
    assert min(shares.values()) < 1
    assert max(shares.values()) <= 1
    expected = init(str(tiny_llama), out=str(tmp_path / "no"), recipe="best-joint", dry_run=True, **options)
    assert bits == {round(expected.bits_per_weight, 6)}
    # The adapter makes up for errors of layers without one as well, so that it notes what these are.
    place = tmp_path / "best-joint"
    quantized = sum(layer["quantizer"] is not None for layer in content["layers"].values())
    assert check(place, base=place / "base").layers == quantized
    file = place / "base/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{bare[0]}.scales": tensors[f"{bare[0]}.scales"] * 4}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of {quantized} layers have other codes or scales .* {bare[0]} first"):
        check(place, base=place / "base")
    with pytest.raises(ModelError, match="was not made for"):
        evaluate(str(tiny_llama), adapter=str(place))


def layer_shape(model, name):
    from quailora.models.load import empty_model

    return linear_layers(empty_model(str(model)))[name].shape


def test_no_layer_gets_a_rank_that_it_cannot_carry(tokenizer, tmp_path):
    """Not even that of the reference network, which other layers have."""
    model = save_llama(tmp_path / "model", tokenizer, num_key_value_heads=1)  # whose keys and values are 16 wide
    words = ["--samples", "8", "--sequence-length", "32", "--bits", "2", "--ranks", "8", "32"]
    assert main(["plan", str(model), "--budget", "20bits", "--out", str(tmp_path / "p"), *words]) == 0
    measured = Measurements.read(tmp_path / "p/measurements.json")
    assert measured.reference.rank == 32
    usable = dict(zip(measured.layers, np.isfinite(measured.costs).tolist(), strict=True))
    assert usable["model.layers.0.self_attn.k_proj"] == usable["model.layers.1.self_attn.v_proj"] == [True, False]
    assert usable["model.layers.0.self_attn.q_proj"] == [True, True]
    layers = BudgetPlan.read(tmp_path / "p").layers
    assert all(layers[name].choice.rank == 8 for name in layers if name.endswith(("k_proj", "v_proj")))


def test_the_reference_network_has_the_most_bits_that_the_budget_allows(tiny_llama, tmp_path):
    """Rank 4 on 2 bits takes more bytes than rank 1 on 3 bits, and leaves larger errors."""
    words = ["--samples", "8", "--sequence-length", "32", "--bits", "2", "3", "--ranks", "1", "4"]
    assert main(["plan", str(tiny_llama), "--budget", "4.8bits", "--out", str(tmp_path / "p"), *words]) == 0
    measured = Measurements.read(tmp_path / "p/measurements.json")
    totals = {choice.title: Planner(measured).nbytes_of(choice) for choice in measured.choices}
    assert totals["3 bits g64 + rank 1"] < totals["2 bits g32 + rank 4"] < 4.8 * measured.weights / 8
    assert measured.reference.title == "3 bits g64 + rank 1"


def test_no_layer_gets_codes_that_no_checkpoint_holds(tokenizer, tmp_path):
    """Of 3 bits, 16 outputs do not fill whole words; the base would be written in floating point."""
    model = save_llama(tmp_path / "model", tokenizer, num_key_value_heads=1)
    words = ["--samples", "8", "--sequence-length", "32", "--bits", "2", "3", "--ranks", "0", "2"]
    assert main(["plan", str(model), "--budget", "20bits", "--out", str(tmp_path / "p"), *words]) == 0
    run = ["--samples", "4", "--sequence-length", "32", "--plan", str(tmp_path / "p")]
    assert main(["init", str(model), "--out", str(tmp_path / "a"), *run]) == 0
    base = StoredBase(str(tmp_path / "a/base"))
    assert base.weight("model.layers.0.self_attn.k_proj", torch.float32).bits == 2
    assert base.weight("model.layers.0.self_attn.q_proj", torch.float32).bits == 3


def test_models_that_no_checkpoint_holds_are_refused(tokenizer, tmp_path, capsys):
    """GPT-2 has layers of a class of its own, which transformers does not load quantized; ranks can be chosen."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=len(tokenizer))).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = ["plan", str(model), "--budget", "6bits", "--out", str(tmp_path / "p"), "--samples", "8"]
    words += ["--sequence-length", "32"]
    assert main(words) == 1
    assert "No checkpoint holds 4 of the 4 layers" in capsys.readouterr().err.replace("\n", " ")
    assert main([*words, "--format", "bitsandbytes", "--bits", "4", "--ranks", "0", "4"]) == 0


def test_costs_are_divergences(tiny_llama, monkeypatch):
    """Of each layer by itself, measured with its error in place; as precisely as some hundred samples allow."""
    monkeypatch.setattr(costs, "PASSES", 400)
    loaded = load_model(str(tiny_llama))
    layers = linear_layers(loaded.model)
    torch.manual_seed(0)
    store, choices = MemoryStore(), possible_choices("gptq", (2, 16), (0, 2))
    for name, layer in layers.items():
        rows, columns = layer.shape
        lora = torch.randn(rows, 2) @ torch.diag(torch.tensor([0.03, 0.01])), 0.1 * torch.randn(2, columns)
        error = RoundingError(0.003 * torch.randn(rows, columns) + lora[0] @ lora[1], *lora)
        store.save(name, StoredLayer(dequantized=layer.weight - error.left(2), packed=error.tensors(0)))
    pieces = torch.randint(0, 300, (8, 24))
    found = costs.measure_costs(Question(choices, choices[1]), loaded, layers, pieces, store)
    errors = {
        (name, rank): RoundingError.read(store.load(name).packed, 0, torch.device("cpu")).left(rank)
        for name in layers
        for rank in (0, 2)
    }
    variants = {key: {key[0]: layers[key[0]].weight - error} for key, error in errors.items()}
    scores = measure(loaded.model, layers, variants | {"all": {n: store.load(n).dequantized for n in layers}}, pieces)
    for row, name in zip(found, layers, strict=True):
        for place, rank in ((0, 0), (1, 2)):
            if name.endswith(("q_proj", "k_proj")):  # which change so little in this model that float32 rounds it away
                continue
            assert row[place].item() == pytest.approx(scores[name, rank].divergence, rel=0.3)
        assert row[2] == 0
    everything = costs.divergence_of_reference(loaded, layers, pieces, store)
    assert everything == pytest.approx(scores["all"].divergence, rel=1e-4)
    assert found[:, 1].sum().item() == pytest.approx(everything, rel=0.3)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_what_later_layers_make_up_for_costs_less(tiny_llama, monkeypatch):
    """Values that are too small, of which the next layer makes up for half: a quarter of the cost is left."""
    monkeypatch.setattr(costs, "PASSES", 400)
    loaded = load_model(str(tiny_llama))
    layers = linear_layers(loaded.model)
    store, choices = MemoryStore(), possible_choices("gptq", (2, 16), (0,))
    for name, layer in layers.items():
        error = 0.1 * layer.weight if name.endswith("0.self_attn.v_proj") else torch.zeros(layer.shape)
        target = layer.weight * (1.05 if name.endswith("0.self_attn.o_proj") else 1.0)
        kept = RoundingError(error, torch.zeros(len(error), 0), torch.zeros(0, error.shape[1]))
        store.save(name, StoredLayer(dequantized=target - error, packed=kept.tensors(0)))
    torch.manual_seed(0)
    pieces = torch.randint(0, 300, (8, 24))
    found = costs.measure_costs(Question(choices, choices[0]), loaded, layers, pieces, store)[:, 0]
    values = {name: store.load(name).dequantized for name in layers if name.endswith("v_proj")}  # of both blocks
    alone = measure(loaded.model, layers, {"values": values}, pieces)["values"].divergence
    assert found.sum().item() == pytest.approx(alone / 4, rel=0.3)
    assert found.sum().item() == pytest.approx(costs.divergence_of_reference(loaded, layers, pieces, store), rel=0.3)


def test_the_share_that_is_left_is_that_of_samples():
    """Of which targets see a part, at half of the step, among what else they make up for."""
    names = [f"model.layers.{block}.{kind}" for block in range(40) for kind in ("v_proj", "o_proj")]
    torch.manual_seed(0)
    seen, unseen, other = torch.randn(3, 4000, len(names) // 2, dtype=torch.float64)
    errors = torch.stack([seen + 0.5 * unseen, other], 2).flatten(1)
    targets = torch.stack([other, 0.5 * seen], 2).flatten(1)
    made_up = (errors * (targets @ later_layers(names).double().T)).mean(0)
    left = shares_left(names, errors.square().mean(0), made_up, 0.5)
    expected = (0.5 * seen + 0.5 * unseen).square().mean() / (seen + 0.5 * unseen).square().mean()
    torch.testing.assert_close(left[::2], expected.expand(40), rtol=0, atol=0.02)


def test_costs_are_the_same_on_every_device(tiny_llama, monkeypatch, accelerator):
    """Labels are drawn on the CPU; what the walk has kept waits there as well."""
    monkeypatch.setattr(costs, "PASSES", 4)
    choices, pieces = possible_choices("gptq", (2, 16), (0, 2)), torch.randint(0, 300, (2, 24))
    found = []
    for device in ("cpu", accelerator):
        loaded = load_model(str(tiny_llama), device=device)
        layers, store = linear_layers(loaded.model), MemoryStore()
        torch.manual_seed(0)
        for name, layer in layers.items():
            rows, columns = layer.shape
            error = RoundingError(torch.randn(rows, columns), torch.randn(rows, 2), torch.randn(2, columns))
            changed = layer.weight.cpu() + 0.1 * torch.randn(rows, columns) - error.left(2)
            store.save(name, StoredLayer(dequantized=changed, packed=error.tensors(0)))
        question = Question(choices, choices[1])
        found.append(costs.measure_costs(question, loaded, layers, pieces, store, "float32"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_another_budget_takes_no_measuring(tiny_llama, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "loaded_model", None)  # nothing is loaded
    arguments = ["plan", str(tiny_llama), "--measurements", str(folder), "--out", str(tmp_path / "p")]
    assert main([*arguments, "--budget", "8bits"]) == 0
    assert "Expected divergence" in capsys.readouterr().out
    assert 5.5 < BudgetPlan.read(tmp_path / "p").bits <= 8
    assert main([*arguments, "--quality", "1e-9", "--overwrite"]) == 0
    assert BudgetPlan.read(tmp_path / "p").divergence <= 1e-9 * (1 + 1e-5)
    assert BudgetPlan.read(tmp_path / "p").bits > 8
    assert main([*arguments, "--budget", "8bits"]) == 1
    assert (tmp_path / "p/frontier.csv").read_text(encoding="utf-8").startswith("bits,plan,uniform")


@pytest.mark.parametrize("after", [2, 15, 17])
def test_a_measurement_that_was_killed_goes_on(tiny_llama, folder, tmp_path, monkeypatch, after):
    """In the walk, or between two pieces of text: the same numbers, also if a file has changed meanwhile."""
    left = [after]

    def dying(original):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments, **options)

        return wrapped

    arguments = ["plan", str(tiny_llama), "--budget", "5.5bits", "--out", str(tmp_path / "p"), *FAST]
    arguments += ["--group-sizes", "32"]
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "stored_errors", dying(measuring.stored_errors))
        patch.setattr(costs, "_sampled", dying(costs._sampled))
        with pytest.raises(Killed):
            main(arguments)
    last = max((tmp_path / "p").rglob("layers/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    assert main(arguments) == 0
    first, second = (Measurements.read(place / "measurements.json") for place in (folder, tmp_path / "p"))
    assert first.layers == second.layers
    assert first.divergence == second.divergence
    assert not (tmp_path / "p/measuring").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "got rank as well"),
        ({"rank_pattern": {"q_proj": 4}, "targets": ["q_proj"]}, "got rank_pattern, targets as well"),
        ({"base": "somewhere"}, "got base as well"),
        ({"inputs": "quantized"}, "got solver, metric or inputs as well"),
    ],
)
def test_a_plan_decides(tiny_llama, folder, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        init(str(tiny_llama), out=str(tmp_path / "a"), plan=str(folder), **{"quantizer": None, **options})


def test_files_that_are_no_plan(tiny_llama, folder, tmp_path, caplog):
    """Damaged, missing, of another kind, or of another model."""
    text = (folder / "plan.json").read_text(encoding="utf-8")
    for content in (text[:-9], "[]", text.replace('"layers"', '"others"'), text.replace('"rank"', '"ranks"')):
        (tmp_path / "plan.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelError):
            BudgetPlan.read(tmp_path)
    with pytest.raises(ModelError, match="Cannot read"):
        BudgetPlan.read(tmp_path / "nowhere")
    measured = (folder / "measurements.json").read_text(encoding="utf-8")
    for content in ("{}", measured.replace('"costs"', '"cost"'), measured.replace("null", "[]").replace("0.", "x")):
        (tmp_path / "measurements.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelError):
            Measurements.read(tmp_path / "measurements.json")
    (tmp_path / "plan.json").write_text(text.replace("model.layers.0", "model.layers.7"), encoding="utf-8")
    arguments = ["init", str(tiny_llama), "--plan", str(tmp_path), "--out", str(tmp_path / "a"), "--samples", "4"]
    with caplog.at_level(logging.WARNING):
        assert main(arguments) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected either"),
        (["--budget", "4bits", "--quality", "0.1"], "Expected either"),
        (["--quality", "0"], "Expected a divergence above 0"),
        (["--budget", "1bits"], "The smallest choice takes"),
        (["--budget", "1kB"], "The smallest choice takes"),
        (["--budget", "4 pounds"], "Expected"),
    ],
)
def test_budgets_that_cannot_be_had(tiny_llama, tmp_path, words, message, capsys):
    """Before the model is read, and with nothing left behind."""
    assert main(["plan", str(tiny_llama), "--out", str(tmp_path / "p"), *FAST, *words]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path(tmp_path / "p").exists()


def test_a_stock_base_with_ranks_of_its_own(tiny_llama, tmp_path):
    """NF4 everywhere: the base stays what bitsandbytes makes, and only ranks are chosen."""
    words = ["--format", "bitsandbytes", "--bits", "4", "--ranks", "0", "2", "8", "--samples", "8"]
    out = tmp_path / "p"
    assert (
        main(["plan", str(tiny_llama), "--budget", "7bits", "--out", str(out), "--sequence-length", "32", *words]) == 0
    )
    plan = BudgetPlan.read(out)
    assert plan.recipe == "best"
    assert len({layer.choice.rank for layer in plan.layers.values()}) > 1
    run = ["--samples", "4", "--sequence-length", "32"]
    assert main(["init", str(tiny_llama), "--plan", str(out), "--out", str(tmp_path / "a"), *run]) == 0
    assert not (tmp_path / "a/base").exists()
    config = json.loads((tmp_path / "a/adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"]


def test_layers_are_measured_for_the_recipe(tiny_llama, tmp_path):
    """A base that is chosen costs less than the one that bitsandbytes makes."""
    words = ["--format", "bitsandbytes", "--ranks", "1", "--samples", "16", "--sequence-length", "32"]
    words += ["--budget", "7bits", str(tiny_llama)]
    totals = []
    for recipe in ("best-joint", "best"):
        out, chosen = tmp_path / recipe, [] if recipe == "best-joint" else ["--recipe", recipe]
        assert main(["plan", "--out", str(out), *words, *chosen]) == 0
        plan, measured = BudgetPlan.read(out), Measurements.read(out / "measurements.json")
        assert plan.recipe == measured.recipe == recipe
        assert plan.method().recipe == resolved_name(recipe)
        assert {layer.choice.title for layer in plan.layers.values()} == {"nf4 + rank 1", "16 bits"}
        totals.append(sum(layer.costs[0] for layer in measured.layers.values()))
    assert 0 < totals[0] < 0.95 * totals[1]


def test_a_plan_with_8_bits_has_one_scale_a_row_there(tiny_llama, tmp_path):
    words = ["--samples", "8", "--sequence-length", "32"]
    run = ["--bits", "4", "8", "--ranks", "1", "--group-sizes", "32", "16", "--budget", "6.5bits"]
    assert main(["plan", str(tiny_llama), "--out", str(tmp_path / "p"), *words, *run]) == 0
    layers = BudgetPlan.read(tmp_path / "p").layers
    assert len({layer.choice.base for layer in layers.values()}) > 1
    arguments = ["init", str(tiny_llama), "--out", str(tmp_path / "a"), "--plan", str(tmp_path / "p"), *words]
    assert main(arguments) == 0
    base = StoredBase(str(tmp_path / "a/base"))
    for name, layer in layers.items():
        quantizer, stored = layer.choice.quantizer, base.weight(name, torch.float32)
        assert (stored.bits, stored.group_size) == (quantizer.bits, quantizer.group_size or stored.columns)


def test_the_code_on_the_card_is_that_of_gptqmodel(tiny_llama, folder, tmp_path, capsys):
    """Because transformers loads no base of different bits; `quailora.load` says so."""
    run = ["--samples", "4", "--sequence-length", "32", "--recipe", "qera-exact"]
    assert main(["init", str(tiny_llama), "--plan", str(folder), "--out", str(tmp_path / "a"), *run]) == 0
    assert f'GPTQModel.load("{tmp_path / "a"}/base")' in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ModelError, match="have different bits, which transformers does not load"):
        quailora.load(tmp_path / "a")
    evaluation = evaluate(str(tiny_llama), adapter=str(tmp_path / "a"))
    assert evaluation.results["quantized + adapter"].perplexity > 0


def test_a_notebook_measures_what_the_terminal_does(tiny_llama, folder, tmp_path, monkeypatch):
    """By name and in memory, and a second time without a pass through the model."""
    arguments = {
        "calibration": Calibration(TextSource(), 16, 32),
        "choices": possible_choices("gptq", (2, 3, 4, 16), (1, 4), (32,)),
        "around": "5.5bits",
    }
    expected = Measurements.read(folder)
    monkeypatch.chdir(tiny_llama.parent)
    name = f"./{tiny_llama.name}"
    measured = quailora.measure_choices(name, state=tmp_path / "state", **arguments)
    assert measured.model == name  # as it was given, and not the folder that it is loaded from
    assert (measured.layers, measured.divergence) == (expected.layers, expected.divergence)
    plan = quailora.Planner(measured).of_budget("5.5bits")
    assert plan.layers == BudgetPlan.read(folder).layers
    with pytest.raises(ConfigurationError, match=r"smallest takes [\d.]+ bits a weight \([\d.]+ [kM]iB\)"):
        quailora.Planner(measured).of_budget("1bits")
    assert repr(measured) == f"Measurements({name!r}: 14 layers, 7 choices)"
    assert "14 layers, " in repr(plan)
    assert plan._repr_markdown_().count("\n") == 1 + 2 + 7  # the plan in words, and a line for each kind of layer
    in_memory = quailora.measure_choices(load_model(str(tiny_llama)).model, **arguments)
    assert in_memory.choices == expected.choices
    torch.testing.assert_close(torch.from_numpy(in_memory.costs), torch.from_numpy(expected.costs))
    monkeypatch.setattr(measuring, "stored_errors", None)
    monkeypatch.setattr(costs, "_sampled", None)
    again = quailora.measure_choices(name, state=tmp_path / "state", **arguments)
    assert again.layers == expected.layers


def test_a_model_that_does_not_fit_is_announced(tiny_llama, monkeypatch, caplog):
    """By a warning; a limit that was given is kept to, and memory that runs out is told in one line."""
    arguments = {"calibration": Calibration(TextSource(), 8, 32), "choices": CHOICES}
    with pytest.raises(DoesNotFitError, match="Expected to stay below"):
        quailora.measure_choices(str(tiny_llama), **arguments, resources=Resources(memory_limit="1MB"))
    monkeypatch.setattr("quailora.pipeline.plan.memory_available", lambda *_: 1000)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has less.")

    monkeypatch.setattr("quailora.budget.measure_choices.measure_model", full)
    with pytest.raises(DoesNotFitError, match="The memory is full"):
        quailora.measure_choices(str(tiny_llama), **arguments)
    assert "holds the whole model in memory" in caplog.text
    assert "on the text that ships with quailora" in caplog.text


def test_batches_are_measured_on(tiny_llama):
    """As 64 windows of a text are, where nothing else is asked for; ranks of NF4 alone keep its base."""
    ids = torch.arange(8 * 32).reshape(8, 32) % 90
    batches = [{"input_ids": part} for part in torch.split(ids, 2)]
    measured = quailora.measure_choices(
        str(tiny_llama), batches, choices=possible_choices("bitsandbytes", (4,), (0, 4)), around="6bits"
    )
    assert measured.recipe == "best"
    assert quailora.Planner(measured).of_budget("5bits").recipe == "best"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": [Choice(Uniform(4, 32)), Choice(NF4())]}, "one checkpoint holds"),
        ({"choices": [Choice(Uniform(5, 32)), Choice(Uniform(5, 32), 4)]}, "one checkpoint holds"),
        ({"choices": [Choice(None)]}, "nothing to plan"),
        ({"choices": [Choice(NF4())]}, "got one"),
        ({"resources": Resources(offload="always")}, "has to be in memory"),
        ({"around": "1bits"}, "The smallest choice takes"),
        ({"state": ""}, "empty path"),
    ],
)
def test_measurements_that_cannot_be_made(tiny_llama, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        quailora.measure_choices(str(tiny_llama), Calibration(TextSource(), 8, 32), **arguments)
