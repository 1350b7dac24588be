"""The laws of families of adapters: every family keeps them, and each law rejects a family that breaks it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems

from quailora import FAMILIES, NF4, SVD, Family, Initializer, InputStatistics, Optimal, Uniform, Zero
from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.core.weightings import FirstTokenWeighting, GramWeighting, ShrunkWeighting
from quailora.errors import CalibrationError, ConfigurationError, TargetError
from quailora.families import Change, Dora, Lora, LoraBias, Shira
from quailora.families.lora import divided_factors
from quailora.schedules.layer import QuantizedLayer
from quailora.testing import check_family, check_identity, indefiniteness, make_problem, rounding

SIZES = {"c3a": {"block_size": 8}, "fourierft": {"n_frequency": 300}, "waveft": {"n_frequency": 300}}
EVERY = [cls(**SIZES.get(name, {})) for name, cls in FAMILIES.items()]
each_family = pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("family", [*EVERY, Shira("adaalloc")], ids=lambda family: family.name)
def test_every_family_keeps_the_laws(family):
    check_family(family)
    check_identity(family, (64, 64), 4)


@each_family
@settings(max_examples=8)
@given(problem=problems(dtypes=(torch.float32,)), data=st.data())
def test_calibrated_error_never_exceeds_uncalibrated_error(family, problem, data):
    """On any layer that can carry the family, with any inputs; and neither exceeds the error without an adapter."""
    rank = data.draw(st.integers(1, min(*problem.weight.shape, 12)))
    try:
        family.shapes(tuple(problem.weight.shape), rank)
    except TargetError:
        return
    layer = Initializer(Uniform(bits=3, group_size=None), Optimal(), rank, family=family)(
        problem.weight, problem.statistics
    )
    moment = problem.statistics.second_moment
    slack = 2 * rounding(layer.error_uncalibrated, layer.error_none, torch.float32, 64)
    slack += 1e-6 * layer.error_none + indefiniteness(problem.weight, moment)
    assert layer.error <= layer.error_uncalibrated + slack
    assert layer.error_uncalibrated <= layer.error_none + slack


@pytest.mark.parametrize("family", [Lora(), LoraBias(), FAMILIES["adalora"](), Dora()], ids=lambda family: family.name)
def test_solvers_compose_with_low_rank_families(family):
    """The solver of an initializer is the one of the family: the optimum leaves less than the SVD, `Zero` all."""
    problem = make_problem(48, 64, "decaying")
    errors = {
        type(solver).__name__: Initializer(NF4(), solver, 4, family=family)(problem.weight, problem.statistics).error
        for solver in (Optimal(), SVD(), Zero())
    }
    none = Initializer(NF4(), Optimal(), 4, family=family)(problem.weight, problem.statistics).error_none
    assert errors["Optimal"] < 0.9 * errors["SVD"] < 0.9 * errors["Zero"]
    assert errors["Zero"] == pytest.approx(none, rel=1e-4)


def test_a_bias_is_fitted_about_the_mean_of_its_metric():
    """As statistics of tokens of which some are there more than once would have it."""
    inputs = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 24)
    weight, firsts = torch.randn(12, 24, generator=torch.Generator().manual_seed(1)), inputs[:, :1]
    found = Initializer(NF4(), Optimal(), 3, FirstTokenWeighting(0.5), family=LoraBias())(
        weight, InputStatistics.from_inputs(inputs)
    )
    twice = InputStatistics.from_inputs(torch.cat([inputs, firsts.expand(-1, 16, -1)], 1))
    expected = Initializer(NF4(), Optimal(), 3, family=LoraBias())(weight, twice)
    for end, tensor in expected.correction.parameters.items():
        torch.testing.assert_close(found.correction.parameters[end], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighting", [GramWeighting(), ShrunkWeighting()], ids=["same metric", "another metric"])
def test_the_fit_without_inputs_is_reported_in_the_gram_metric(weighting):
    problem, family = make_problem(48, 64, "decaying"), Dora()
    layer = Initializer(NF4(), Optimal(), 4, weighting, family=family)(problem.weight, problem.statistics)
    objective = QuantizedLayer.of(NF4(), problem.weight, problem.statistics).objective
    assert layer.error_uncalibrated == pytest.approx(family.uncalibrated(objective, 4).error)


def test_a_family_is_fitted_without_inputs_once_a_layer(monkeypatch):
    problem, family, calls = make_problem(16, 32), FAMILIES["miss"](), []
    uncalibrated = type(family).uncalibrated
    monkeypatch.setattr(
        type(family), "uncalibrated", lambda self, *given: calls.append(given) or uncalibrated(self, *given)
    )
    Initializer(NF4(), Optimal(), 4, family=family)(problem.weight, problem.statistics)
    assert len(calls) == 1


def test_a_bias_needs_the_mean():
    problem = make_problem(8, 16)
    objective = Objective(problem.weight, gram(problem.statistics))
    with pytest.raises(CalibrationError, match="needs the mean of the inputs"):
        LoraBias().fit(objective, 2)
    with pytest.raises(ConfigurationError, match="which has to be in the objective"):
        Dora().fit(objective, 2)
    with pytest.raises(ConfigurationError, match="takes no weighting of outputs"):
        Dora().fit(replace(objective, row_scale=torch.ones(8, 1)), 2)


def test_dora_with_an_output_whose_weights_are_zero():
    """PEFT divides by the norm of each row, and would make NaN of a row of zeros."""
    problem = make_problem(16, 32)
    problem.weight[3] = 0
    layer = Initializer(NF4(), Optimal(), 4, family=Dora())(problem.weight, problem.statistics)
    change = layer.correction.dense(layer.quantized.dequantize())
    assert change.isfinite().all()
    assert change[3].abs().max() < 1e-5  # zero up to rounding, which is larger with kernels of older CPUs
    factors = layer.correction.parameters
    assert (layer.quantized.dequantize() + factors["lora_B.weight"] @ factors["lora_A.weight"]).norm(dim=1).all()


@dataclass(frozen=True)
class Broken(Family):
    """LoRA by the SVD in one file, with one thing about it changed."""

    peft_type: ClassVar[str] = "LORA"
    default_rank: ClassVar[int | None] = 8
    scales: ClassVar[bool] = True
    nested: ClassVar[bool] = True

    fault: str = ""

    def shapes(self, shape, rank):
        if not 1 <= rank <= min(shape):
            raise TargetError(f"Expected a rank from 1 to {min(shape)}, got {rank}.")
        return {"lora_A.weight": (rank, shape[1]), "lora_B.weight": (shape[0], rank)}

    def solve(self, objective, rank):
        used = max(1, 9 - rank) if self.fault == "larger is worse" else rank
        found = Optimal().minimise(objective, used)
        lora_A, lora_B = found.lora_A, found.lora_B
        if used != rank:
            lora_A = torch.cat([lora_A, lora_A[:1].expand(rank, -1)])[:rank]
            lora_B = torch.cat([lora_B, 0 * lora_B[:, :1].expand(-1, rank)], 1)[:, :rank]
        if self.fault == "narrow":
            lora_A = lora_A[:, 1:]
        if self.fault == "dead":
            lora_A, lora_B = 0 * lora_A, 0 * lora_B
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    def change(self, parameters, base=None):
        factor = {"misjudges": 1.5, "plain": 1.0}.get(self.fault, 1.0)
        return Change(factor * parameters["lora_B.weight"] @ parameters["lora_A.weight"])

    def config(self, sizes):
        return {"r": sizes["r"], "lora_alpha": sizes["lora_alpha"]}

    def scale(self, alpha, rank, *, rslora=False):
        return 1.0 if self.fault == "forgets the scale" else alpha / rank

    def stored(self, parameters, scale):
        return divided_factors(parameters, scale)

    def uncalibrated(self, objective, rank):
        if self.fault in {"dead", "narrow"}:
            return self.finished(objective, self.solve(objective, rank))
        return super().uncalibrated(objective, rank)


def test_a_family_of_ones_own_keeps_the_laws():
    check_family(Broken())


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("narrow", "parameters have shapes|must match the size"),
        ("larger is worse", "a larger size is worse"),
        ("misjudges", "Tensor-likes are not close"),
        ("forgets the scale", "Tensor-likes are not close"),
        ("dead", "no gradient reaches"),
    ],
)
def test_laws_reject_a_family_that_breaks_them(fault, law):
    with pytest.raises((AssertionError, RuntimeError), match=law):
        check_family(Broken(fault), bases=["float"])
