"""SHiRA: values against a least-squares solve by NumPy, places, and PEFT's files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regressions import least_error
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

from quailora.core.metrics import Diagonal, Gram, Identity
from quailora.core.objective import Objective
from quailora.errors import TargetError
from quailora.families.shira import Shira
from quailora.families.sparse import shared_out
from quailora.testing import make_problem
from quailora.testing.families import objective_of
from quailora.testing.stock import load_stock, stock_layer

KINDS = ["generic", "decaying", "rank-deficient", "single token", "dead channels", "massive channel"]

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # in PEFT's layer


def places(parameters, shape):
    """Return the numbers of the entries, counted row by row."""
    row, column = parameters["shira_indices"].long()
    assert row.max() < shape[0]
    assert column.max() < shape[1]
    return row * shape[1] + column


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_least_squares_solution_at_their_places(kind):
    objective, base = objective_of(make_problem(16, 40, kind, seed=3))
    fit = Shira().fit(objective, 2)
    expected = least_error(Shira(), objective, fit.correction.parameters, "shira_weight", base)
    assert fit.error == pytest.approx(expected, rel=1e-4, abs=1e-6 * objective.value_at_zero)


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_there_once_in_the_order_of_rows(kind):
    objective, _ = objective_of(make_problem(24, 40, kind, seed=4))
    for parameters in (Shira().solve(objective, 9), Shira().identity((24, 40), 9)):
        assert parameters["shira_indices"].dtype == torch.int32
        assert (places(parameters, (24, 40)).diff() > 0).all()
        assert parameters["shira_indices"].shape == (2, 9 * 64)


@pytest.mark.parametrize("metric", [Identity(), Diagonal(torch.linspace(0.1, 9, 48, dtype=torch.float64).square())])
def test_in_a_diagonal_metric_the_largest_entries_are_taken(metric):
    error = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    found = Shira().fit(Objective(error, metric, base=lambda: error), 3)
    power = torch.ones(48) if isinstance(metric, Identity) else metric.second_moment
    energies = (error.double().square() * power).flatten().sort().values
    assert found.error == pytest.approx(energies[: -3 * 80].sum().item(), rel=1e-6)


def test_chosen_places_beat_others_by_far():
    """PEFT's kind of places with fitted values, and the largest entries of the error."""
    objective, base = objective_of(make_problem(64, 48, "decaying", seed=1))
    fit = Shira().fit(objective, 4)
    random = least_error(Shira(), objective, Shira().identity((64, 48), 4), "shira_weight", base)
    assert fit.error < 0.4 * random
    assert fit.error < 0.4 * Shira().uncalibrated(objective, 4).error


@pytest.mark.parametrize("kind", KINDS)
def test_adaalloc_gives_each_output_entries_by_the_norm_of_its_error(kind):
    """Against a loop over the outputs; the values are the least-squares solution at these places."""
    family, problem = Shira("adaalloc"), make_problem(16, 40, kind, seed=3)
    objective, base = objective_of(problem)
    parameters = family.solve(objective, 2)
    row, column = parameters["shira_indices"].long()
    norms = objective.error.double().norm(dim=1)
    counts = row.bincount(minlength=16)
    assert counts.sum() == 2 * 56
    torch.testing.assert_close(counts.double(), (2 * 56 * norms / norms.sum()), rtol=0, atol=1)
    power = objective.error.double().square() * problem.statistics.second_moment.diagonal()
    for index, count in enumerate(counts.tolist()):
        taken = power[index, column[row == index]]
        torch.testing.assert_close(taken.sum(), power[index].topk(count).values.sum())
    fit = family.finished(objective, parameters)
    expected = least_error(family, objective, parameters, "shira_weight", base)
    assert fit.error == pytest.approx(expected, rel=1e-4, abs=1e-6 * objective.value_at_zero)


@settings(max_examples=100)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    most=st.integers(1, 20),
    share=st.floats(0, 1),
)
def test_whole_numbers_are_shared_out_completely(weights, most, share):
    count = round(share * most * len(weights))
    given = shared_out(torch.tensor(weights, dtype=torch.float64), count, most)
    assert given.sum() == count
    assert given.min() >= 0
    assert given.max() <= most


@pytest.mark.parametrize("rows", [0, 1, 12])
def test_more_entries_than_there_is_to_gain(rows):
    """An error in a few rows, which take one round after the other; all other entries are zero."""
    problem = make_problem(24, 40, "decaying", seed=2)
    error = problem.weight * (torch.arange(24) < rows)[:, None]
    objective = Objective(error, Gram(problem.statistics.second_moment), base=lambda: error)
    fit = Shira().fit(objective, 10)
    assert fit.error <= 1e-8 * objective.value_at_zero
    assert not fit.correction.dense(error)[rows:].any()


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_stock_peft_takes_the_places_of_the_file(base):
    problem = make_problem(48, 32, "decaying", seed=1)
    objective, quantized = objective_of(problem)
    correction = Shira().fit(objective, 3).correction
    layer = load_stock(stock_layer(problem.weight, base), correction, 3).base_model.model.layer
    torch.testing.assert_close(layer.shira_indices["default"], correction.parameters["shira_indices"], rtol=0, atol=0)
    torch.testing.assert_close(layer.get_delta_weight("default").to_dense(), correction.dense(quantized))


def test_stock_peft_computes_it_on_torchao():
    problem = make_problem(48, 32, "decaying", seed=1)
    module, inputs = stock_layer(problem.weight, "float"), problem.inputs.float()
    quantize_(module, Int8WeightOnlyConfig())
    module.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))  # PEFT asks for it
    correction = Shira().fit(objective_of(problem)[0], 3).correction
    expected = module(inputs) + inputs @ correction.dense().T
    torch.testing.assert_close(load_stock(module, correction, 3)(inputs), expected, rtol=0, atol=1e-5)


def test_int8_takes_inputs_in_float32_or_under_autocast():
    """PEFT's copy of the weight is in float32. If this fails, that is over, as is a sentence of the docstring."""
    problem = make_problem(48, 32, "decaying", seed=1)
    correction = Shira().fit(objective_of(problem)[0], 3).correction
    loaded = load_stock(stock_layer(problem.weight, "int8"), correction, 3)
    with pytest.raises(RuntimeError, match="same dtype"):
        loaded(problem.inputs.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(problem.inputs.bfloat16()).isfinite().all()


def test_more_entries_than_the_weight_has_are_refused():
    assert Shira().count((192, 576), 144) == 144 * 768 == Shira().numbers((192, 576), 144) / 3
    with pytest.raises(TargetError, match=r"Expected a rank from 1 to 144 for .?shira.? in a layer of shape \(192, 5"):
        Shira().shapes((192, 576), 145)
