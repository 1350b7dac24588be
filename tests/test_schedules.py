"""Schedules and recipes: laws over every row of the table, and each schedule against its definition."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import each_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import svd
from scipy.optimize import minimize
from strategies import problems

from quailora import FP4, GPTQ, NF4, NF4GPTQ, NF4MSE, SVD, Gram, Initializer, InputStatistics, Int8, Optimal, Uniform
from quailora.adapters.lora import LoraScaling
from quailora.core.paired import PairedStatistics
from quailora.core.weightings import FisherWeighting, GramWeighting, IdentityWeighting, Sensitivity, ShrunkWeighting
from quailora.errors import CalibrationError, ConfigurationError
from quailora.families import Lora
from quailora.layer.asymmetric import initialize_asymmetric
from quailora.methods.recipes import RECIPES, find_recipe
from quailora.schedules import SRR, Alternate, HeldOut, Once, ProjQ, Schedule
from quailora.schedules.layer import QuantizedLayer, Validation
from quailora.schedules.magr import MagR, onto_l1_ball, reduced
from quailora.schedules.projq import deflated
from quailora.schedules.srr import preserved_rank
from quailora.support.settings import build, describe
from quailora.testing import make_problem, rounding

BASES = [NF4(), NF4(block_size=32, double_quantization=False), Uniform(bits=3, group_size=16), Uniform(bits=2)]


def initializer(row, base, rank):
    return row.method(base, LoraScaling(rank)).initializer


def planted():
    """A weight with two large directions, which can be preserved or taken off first."""
    problem = make_problem(24, 64)
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(24, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    return replace(problem, weight=problem.weight + 0.1 * large)


def two_networks(problem, noise):
    """Inputs of a layer in full precision, and in a network whose layers before it were quantized: each token twice."""
    generator = torch.Generator().manual_seed(0)
    full = problem.inputs.double()
    change = torch.randn(full.shape, generator=generator, dtype=torch.float64)
    return full.repeat(2, 1), (full * (1 + noise * change)).repeat(2, 1)


def initialized(recipe, base, rank, problem, noise=0.1):
    """A layer as its recipe fits it: to inputs in full precision, of the quantized network, or of both.

    The tokens that asymmetric inputs hold out are the same as those that they are fitted to, so that what is best for
    one part is best for all.
    """
    method = initializer(recipe, base, rank)
    full, quantized = two_networks(problem, noise)
    if recipe.inputs == "asymmetric":
        every, held_out = (
            PairedStatistics.from_inputs(full[:tokens], quantized[:tokens]) for tokens in (len(full), len(full) // 2)
        )
        return initialize_asymmetric(method, problem.weight, every, held_out, recipe.step)[0]
    statistics = InputStatistics.from_inputs(full if recipe.inputs == "full" else quantized)
    return method(problem.weight, statistics, some_sensitivity(problem.weight.shape))


def some_sensitivity(shape):
    generator = torch.Generator().manual_seed(0)
    return Sensitivity(*(torch.rand(side, generator=generator, dtype=torch.float64) for side in shape))


@each_recipe
@settings(max_examples=10)
@given(problem=problems(dtypes=(torch.float32,)), base=st.sampled_from(BASES), data=st.data())
def test_every_recipe_keeps_the_order_of_errors(name, problem, base, data):
    """Law 2, whatever the base became: optimum <= recipe, and calibrated recipes <= uncalibrated <= no correction."""
    rank = data.draw(st.integers(1, min(problem.weight.shape)))
    recipe = find_recipe(name)
    layer = initialized(recipe, base, rank, problem)
    slack = 2 * rounding(layer.error_uncalibrated, layer.error_none, torch.float32) + 1e-9 * layer.error_none
    assert layer.error_optimal <= layer.error + slack
    assert layer.low_rank.gain >= -1e-6 * layer.low_rank.total.value  # in the metric of the method
    if recipe.weighting != FisherWeighting():  # whose weights of outputs promise nothing about the plain error
        assert layer.error <= layer.error_none + slack
    if recipe.solver.needs_calibration and recipe.weighting == GramWeighting():
        assert layer.error <= layer.error_uncalibrated + slack


def test_no_two_recipes_are_the_same_method():
    """At least one part of each differs from every other recipe, and the laws above see what can differ in a layer."""
    parts = {
        name: (
            recipe.solver,
            recipe.weighting,
            recipe.schedule,
            recipe.rounding,
            recipe.inputs,
            recipe.distillation,
            recipe.step,
            recipe.blocks,
        )
        for name, recipe in RECIPES.items()
    }
    assert [(one, other) for one, other in combinations(parts, 2) if parts[one] == parts[other]] == []
    problem = planted()
    layers = {name: initialized(recipe, Uniform(bits=3, group_size=16), 4, problem) for name, recipe in RECIPES.items()}
    same = {
        (one, other)
        for one, other in combinations(layers, 2)
        if torch.equal(layers[one].low_rank.dense(), layers[other].low_rank.dense())
    }
    assert same == {
        ("qlora", "rilq"),
        ("asymmetric-half", "distilled"),
        ("asymmetric-half", "fine-tuned"),
        ("distilled", "fine-tuned"),
        ("asymmetric-half-srr", "distilled-joint"),
        ("asymmetric-half", "block-trained"),
        ("block-trained", "distilled"),
        ("block-trained", "fine-tuned"),
        ("asymmetric-half-srr", "block-trained-joint"),
        ("block-trained-joint", "distilled-joint"),
    }
    trained = {name for name, row in RECIPES.items() if row.distillation is not None or row.blocks is not None}
    assert all(other in trained for _, other in same)


PROMISING = [name for name, row in RECIPES.items() if not isinstance(row.schedule, Once | MagR)]


def test_only_smaller_magnitudes_promise_nothing():
    assert {name for name, row in RECIPES.items() if isinstance(row.schedule, MagR)} == {"cloq"}


@pytest.mark.parametrize("name", PROMISING)
@settings(max_examples=10)
@given(problem=problems(dtypes=(torch.float32,)), base=st.sampled_from(BASES), data=st.data())
def test_schedules_are_never_worse_than_quantizing_once(name, problem, base, data):
    """Law 4, in the metric that the method minimises."""
    recipe = find_recipe(name)
    rank = data.draw(st.integers(1, min(problem.weight.shape)))
    # Roundings that are chosen on held-out tokens are of the target, which is the weight where the networks are equal.
    noise = 0.0 if recipe.schedule.needs_validation else 0.1
    found = initialized(recipe, base, rank, problem, noise)
    once = initialized(replace(recipe, schedule=Once()), base, rank, problem, noise)
    slack = 2 * rounding(once.low_rank.error, once.error_none, torch.float32) + 1e-9 * once.error_none
    assert found.low_rank.error <= once.low_rank.error + slack


@each_recipe
def test_a_recipe_changes_the_base_if_and_only_if_it_says_so(name):
    recipe, base, problem = find_recipe(name), Uniform(bits=3, group_size=16), planted()
    stored = initialized(recipe, base, 4, problem).quantized.dequantize()
    assert (
        torch.equal(stored, base.quantize(problem.weight).dequantize())
        != recipe.method(base, LoraScaling(2)).changes_base
    )


def test_the_methods_do_what_they_claim():
    """The orderings that the papers report, on a layer with decaying inputs at 2 bits."""
    problem = make_problem(96, 128, "decaying")
    base = Uniform(bits=2, group_size=32)

    def relative(name, of="gram"):
        layer = initializer(find_recipe(name), base, 8)(problem.weight, problem.statistics)
        if of == "gram":
            return layer.error
        return (problem.weight - layer.quantized.dequantize() - layer.low_rank.dense()).square().sum().item()

    assert relative("loftq", "weight") < relative("lorc", "weight") < relative("qlora", "weight")
    assert relative("qera-exact") < relative("qera-approx") < relative("lorc")
    assert relative("qera-exact") == pytest.approx(relative("quailora"), rel=5e-3)
    assert relative("cloq") < relative("qera-exact")
    assert relative("caldera") < relative("qera-exact")
    assert relative("srr") <= relative("qera-exact")


@pytest.mark.parametrize("start", ["quantize", "low-rank", "outliers"])
def test_alternation_by_hand(start):
    """One round against the definition, with SciPy's decomposition."""
    problem = make_problem(12, 20)
    base = Uniform(bits=2, group_size=None)

    def best(matrix):
        u, s, vh = svd(matrix.double().numpy())
        return torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3]).float()

    weight = problem.weight
    if start == "quantize":
        taken = best(weight - base.quantize(weight).dequantize())
    elif start == "low-rank":
        taken = best(weight)
    else:
        taken = torch.zeros_like(weight)
        loud = problem.statistics.second_moment.diagonal().topk(3).indices
        taken[:, loud] = weight[:, loud]
    candidates = [base.quantize(weight).dequantize(), base.quantize(weight - taken).dequantize()]
    expected = min((weight - q - best(weight - q)).square().sum().item() for q in candidates)
    alternating = Initializer(base, SVD(), 3, IdentityWeighting(), Alternate(rounds=1, start=start))
    layer = alternating(weight, problem.statistics)
    assert layer.low_rank.error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "base"),
    [
        (Alternate(5), GPTQ(2, 16)),
        (Alternate(5, start="low-rank"), GPTQ(2, 16)),
        (Alternate(5, start="outliers"), GPTQ(2, 16)),
        (SRR(), Uniform(2, 16)),
    ],
    ids=repr,
)
def test_the_best_iterate_is_kept(schedule, base):
    """Of all that the schedule has solved for; on layers where that is not always the same one, nor the last one."""
    solve = partial(Lora(Optimal()).fit, rank=4)
    best = []
    for problem in (*(make_problem(24, 64, "decaying", seed=seed) for seed in range(4)), planted()):
        layer, errors = QuantizedLayer.of(base, problem.weight, problem.statistics), {}

        def solve_and_note(objective, errors=errors):
            correction = solve(objective)
            errors.setdefault(objective, correction.error)
            return correction

        chosen = schedule.choose(layer, solve_and_note, 4)
        iterates = list(errors.values())
        assert solve(chosen.objective).error == pytest.approx(min(iterates))
        best.append(iterates.index(min(iterates)) - len(iterates))
    assert len(set(best)) > 1


def test_the_feedback_does_not_see_what_the_correction_repairs():
    """`H'` is `L (I - V V^T) L^T` with the right singular vectors of `E L`."""
    problem = make_problem(10, 16)
    layer = QuantizedLayer.of(Uniform(bits=2), problem.weight, problem.statistics)
    moment = problem.statistics.second_moment
    root = torch.linalg.cholesky(moment)
    _, _, vh = torch.linalg.svd(layer.objective.error.double() @ root)
    kept = torch.eye(16, dtype=torch.float64) - vh[:3].T @ vh[:3]
    expected = root @ kept @ root.T
    found = deflated(problem.statistics, layer.objective, 3).second_moment
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_preserved_rank_by_definition():
    problem = make_problem(12, 16, "decaying")
    noise = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    layer = QuantizedLayer.of(Uniform(bits=3), problem.weight, problem.statistics)
    root = torch.linalg.cholesky(problem.statistics.second_moment + 1e-12 * torch.eye(16, dtype=torch.float64))
    tails = []
    for matrix in (problem.weight, noise):
        energies = torch.linalg.svdvals(matrix.double() @ root).square()
        tails.append([energies[kept:].sum() / energies.sum() for kept in range(6)])
    expected = min(range(6), key=lambda kept: tails[0][kept] * tails[1][5 - kept])
    assert preserved_rank(layer.objective_of(problem.weight), layer.objective_of(noise), 5) == expected


@given(seed=st.integers(0, 2**16), columns=st.integers(1, 12), radius=st.floats(0.01, 5))
def test_projection_onto_the_1_norm_ball(seed, columns, radius):
    """Inside, the point itself; outside, soft thresholding that ends on the ball (its optimality condition)."""
    rows = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for point, found in zip(rows, onto_l1_ball(rows, radius), strict=True):
        if point.abs().sum() <= radius:
            torch.testing.assert_close(found, point)
            continue
        assert found.abs().sum().item() == pytest.approx(radius)
        live = found != 0
        threshold = (point.abs() - found.abs())[live]
        torch.testing.assert_close(threshold, threshold[:1].expand_as(threshold))
        assert (point.abs()[~live] <= threshold[0] + 1e-12).all()


def test_reduced_magnitudes_minimise_their_objective():
    """Against SciPy's minimiser from the same start, for one row."""
    problem = make_problem(1, 6)
    metric = Gram(problem.statistics.second_moment)
    moment = problem.statistics.second_moment.numpy()
    scaled = moment / np.linalg.eigvalsh(moment)[-1]
    row = problem.weight[0].double().numpy()

    def value(x):
        return 0.5 * (x - row) @ scaled @ (x - row) + 1e-3 * np.abs(x).max()

    found = reduced(problem.weight, metric, 1e-3, 3000)
    best = min(
        minimize(
            value, row * scale, method="Nelder-Mead", options={"maxiter": 20000, "fatol": 1e-14, "xatol": 1e-10}
        ).fun
        for scale in (1, 0.5, 0.9)
    )
    assert value(found[0].double().numpy()) <= best * (1 + 1e-3)
    assert found.abs().max() < problem.weight.abs().max()


@each_recipe
def test_schedules_survive_the_sidecar(name):
    schedule = find_recipe(name).schedule
    assert build(Schedule, json.loads(json.dumps(describe(schedule)))) == schedule


def test_feedback_keeps_the_grid():
    assert NF4(block_size=128).with_feedback() == NF4GPTQ(block_size=128, shrinkage=0.0)
    assert Uniform(3, 32, symmetric=True).with_feedback() == GPTQ(3, 32, symmetric=True, shrinkage=0.0)
    assert GPTQ(activation_order=True).with_feedback() == GPTQ(activation_order=True)
    assert NF4GPTQ(damping=0.3, mse=True).with_feedback() == NF4GPTQ(damping=0.3, mse=True)
    damped = NF4GPTQ(block_size=128, damping=1.0, mse=True, shrinkage=0.0)
    assert NF4(block_size=128).with_least_error().with_feedback(1.0) == damped
    assert GPTQ(3, 32).with_least_error().with_feedback() == GPTQ(3, 32, mse=True, shrinkage=0.0)
    assert NF4().with_feedback().with_least_error() == NF4MSE()
    for other in (Int8(), FP4()):
        assert other.with_feedback() is None
        assert other.with_least_error() is None
        with pytest.raises(ConfigurationError, match=r"no rounding with error feedback for .*; take NF4 or Uniform"):
            RECIPES["cloq"].method(other, LoraScaling(2))
        with pytest.raises(ConfigurationError, match=r"rounds in one way only, .*\. Take NF4 or Uniform"):
            RECIPES["asymmetric-half-srr"].method(other, LoraScaling(2)).check()
    with pytest.raises(ConfigurationError, match="for a base that is quantized already; take NF4"):
        RECIPES["cloq"].method(None, LoraScaling(2))


def test_the_rounding_is_chosen_by_the_tokens_that_are_held_out():
    """Whichever rounding has the least validation error is taken, and fitted to all tokens."""
    problem = make_problem(24, 64, "decaying")
    part = make_problem(24, 64, "decaying", seed=1).statistics
    base = Uniform(bits=3, group_size=16)
    schedule = HeldOut(Once(), (0.01, 1.0))
    nearest = base.with_least_error()
    candidates = [base, nearest, nearest.with_feedback(0.01), nearest.with_feedback(1.0)]
    solve = partial(Lora(Optimal()).fit, rank=2)
    layer = QuantizedLayer.of(base, problem.weight, problem.statistics)
    part_layer = QuantizedLayer.of(base, problem.weight, part)
    for candidate in candidates:
        fitted = replace(part_layer, quantizer=candidate).requantized(problem.weight)
        wanted = fitted.quantized.dequantize() + solve(fitted.objective).dense()

        def validation_error(other, wanted=wanted):
            return (other - wanted).square().sum().item()

        found = schedule.choose(replace(layer, validation=Validation(part_layer, validation_error)), solve, 2)
        assert found.quantizer == candidate
        expected = candidate.quantize(problem.weight, problem.statistics).dequantize()
        torch.testing.assert_close(found.quantized.dequantize(), expected)


@pytest.mark.parametrize("weighting", [GramWeighting(), ShrunkWeighting(0.5)], ids=repr)
def test_roundings_are_fitted_without_the_tokens_that_judge_them(weighting):
    """Corrections of candidates are found in the metric of the part of the tokens that is not held out."""
    problem, part = make_problem(24, 64, "decaying"), make_problem(24, 64, "decaying", seed=1).statistics
    base = Uniform(bits=3, group_size=16)
    layer = QuantizedLayer.of(base, problem.weight, problem.statistics)
    fitted = QuantizedLayer.of(base, problem.weight, part)
    judged = []
    validation = Validation(fitted, lambda weight: judged.append(weight) or float(len(judged)))
    Initializer(base, Optimal(), 3, weighting, HeldOut(Once(), (0.01,))).correct(replace(layer, validation=validation))
    metric = weighting.metric(part)
    for candidate, found in zip((base, base.with_least_error()), judged, strict=False):
        quantized = candidate.quantize(problem.weight).dequantize()
        expected = quantized + Optimal().solve(problem.weight - quantized, metric, 3).dense()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(judged) == 3


def test_bad_compositions_are_refused():
    problem = make_problem(8, 16)
    with pytest.raises(ConfigurationError, match="at least 1 round, got 0"):
        Alternate(rounds=0)
    with pytest.raises(ConfigurationError, match="needs calibration and a quantizer with error feedback"):
        Initializer(NF4(), Optimal(), 2, schedule=ProjQ())(problem.weight, problem.statistics)
    with pytest.raises(ConfigurationError, match="needs held-out tokens, which only asymmetric inputs have"):
        initializer(find_recipe("best-joint"), NF4(), 2)(problem.weight, problem.statistics)
    with pytest.raises(CalibrationError, match="needs calibration"):
        initializer(RECIPES["srr"], NF4(), 2)(problem.weight)
    with pytest.raises(ConfigurationError, match=r"Unknown recipe 'lora'. Expected one of qlora, "):
        find_recipe("lora")
    with pytest.raises(ConfigurationError, match=r"or a base that is quantized already, got neither\. Give"):
        RECIPES["quailora"].method(None, LoraScaling(2)).check()
    with pytest.raises(ConfigurationError, match=r"got full inputs\. Pass `inputs='asymmetric'`"):
        replace(find_recipe("best-joint").method(NF4(), LoraScaling(2)), inputs="full").check()
