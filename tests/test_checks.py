"""The checks for backends of other people: each law rejects a backend that breaks it, on the standard cases alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from quailora import Optimal, Quantizer, Solver, Uniform, Zero
from quailora.quantizers import QuantizedWeight
from quailora.testing import check_quantizer, check_solver


@dataclass(frozen=True)
class Changed(Solver):
    """The optimum, or no correction at all, with one thing about the solution changed."""

    change: Callable
    inner: Solver = Optimal()  # noqa: RUF009 # frozen
    needs_calibration: bool = True

    def minimise(self, objective, rank):
        return self.change(self.inner.minimise(objective, rank), objective)


def unchanged(solution, objective):
    return solution


def of_another_rank(solution, objective):
    doubled = solution.lora_A.repeat(2, 1), solution.lora_B.repeat(1, 2), solution.energies.repeat(2)
    return replace(solution, **dict(zip(("lora_A", "lora_B", "energies"), doubled, strict=True)))


def narrower(solution, objective):
    return replace(solution, lora_A=torch.cat([solution.lora_A, solution.lora_A], 1))


def taller(solution, objective):
    return replace(solution, lora_B=torch.cat([solution.lora_B, solution.lora_B]))


def boastful(solution, objective):
    return replace(solution, gain=solution.gain + 0.01 * solution.total.value)


def measured(solution, objective):
    return replace(solution, gain=objective.measure(solution.lora_B, solution.lora_A)[0])


def turned(solution, objective):
    return measured(replace(solution, lora_B=-solution.lora_B), objective)


def weaker(solution, objective):
    """The optimum at rank 1, and hardly anything of it at higher ranks."""
    return measured(replace(solution, lora_B=solution.lora_B / 100), objective) if solution.rank > 1 else solution


def dead(solution, objective):
    return replace(solution, lora_A=0 * solution.lora_A)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Changed(of_another_rank), r"returns rank 2: .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(narrower), r"lora_A has shape \(1, 128\): .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(taller), r"lora_B has shape \(48, 1\): .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(boastful), r"reports .*, achieves .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(turned), r"worse than no correction \(.* > .*\): .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(unchanged, Zero()), r"worse than the SVD \(.* > .*\): .*, rank 1, .* inputs, 24 x 64, seed 0"),
        (Changed(weaker, needs_calibration=False), r"a higher rank is worse \(.* > .*\): .*, rank 2, .*, seed 0"),
        (Changed(dead, Zero(), needs_calibration=False), r"a direction that cannot be trained: .*, rank 1, .*, seed 0"),
    ],
    ids=lambda value: value.change.__name__ if isinstance(value, Changed) else "",
)
def test_a_solver_that_breaks_a_law_is_rejected(solver, message):
    with pytest.raises(AssertionError, match=message):
        check_solver(solver)


@pytest.mark.parametrize(
    "solver", [Changed(unchanged), Changed(unchanged, Zero(), needs_calibration=False)], ids=["Optimal", "Zero"]
)
def test_a_solver_that_keeps_the_laws_passes(solver):
    check_solver(solver)


@dataclass(frozen=True)
class Stored(QuantizedWeight):
    """A stored weight with one thing changed."""

    inner: QuantizedWeight
    change: Callable

    @property
    def shape(self):
        return self.inner.shape

    def tensors(self):
        return self.inner.tensors()

    def dequantize(self):
        return self.change(self.inner.dequantize())


@dataclass(frozen=True)
class Spoiled(Quantizer):
    """Rounding to nearest with one thing changed: of the weight that is given, or of what comes back."""

    before: Callable = torch.Tensor.clone
    after: Callable = torch.Tensor.clone

    def encode(self, weight, statistics):
        return Stored(Uniform().quantize(self.before(weight)), self.after)

    def stock_config(self):
        return None


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (Spoiled(before=lambda weight: weight.mul_(2)), "changes the weight in place: .*, 24 x 64, seed 0"),
        (Spoiled(after=lambda weight: weight[:, 1:]), "dequantize changes the shape: .*, 24 x 64, seed 0"),
        (Spoiled(after=torch.Tensor.double), "dequantize changes the dtype: .*, 24 x 64, seed 0"),
        (Spoiled(after=lambda weight: weight / 0), "dequantize gives NaN or infinity: .*, 24 x 64, seed 0"),
        (Spoiled(after=torch.neg), "further from the weight than zero is: .*, 24 x 64, seed 0"),
    ],
    ids=["in place", "shape", "dtype", "not finite", "far away"],
)
def test_a_quantizer_that_breaks_a_law_is_rejected(quantizer, message):
    with pytest.raises(AssertionError, match=message):
        check_quantizer(quantizer)


def test_a_quantizer_that_changes_its_own_output_is_rejected():
    smaller = Spoiled(after=lambda weight: 0.9 * weight)
    check_quantizer(smaller)
    with pytest.raises(AssertionError, match=r"not idempotent: .*, 24 x 64, seed 0"):
        check_quantizer(smaller, idempotent=True)
