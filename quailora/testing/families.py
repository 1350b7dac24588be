"""The laws of families of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.metrics import Identity, gram
from ..core.objective import Objective
from ..errors import TargetError
from ..families import Change, Family, Fit
from .laws import INPUT_KINDS, Problem, indefiniteness, make_problem, rounding
from .stock import StockBase, dequantized, load_stock, stock_layer

_SHAPES = ((48, 32), (32, 64), (64, 64))
_RANKS = (2, 4, 8)
_TOLERANCE = {"float": 1e-4, "nf4": 1e-4, "int8": 2e-2}  # of the outputs; int8 also rounds the inputs


def check_family(family: Family, problem: Problem | None = None, *, bases: Sequence[StockBase] | None = None) -> None:
    """Check the laws of a family of adapters, and load its files with stock PEFT.

    Args:
        family: the family.
        problem: one case; some cases of several shapes and kinds of inputs if it is missing.
        bases: the bases on which stock PEFT has to compute what the family says; those that the family names if None.

    Raises:
        AssertionError: naming the law and the case.
    """
    checked = 0
    for case in [problem] if problem else family_problems():
        shape = (case.weight.shape[0], case.weight.shape[1])
        ranks = list(carried(family, shape))
        checked += len(ranks)
        for rank in ranks:
            _check_fit(family, case, rank)
        if ranks and family.nested:
            _check_nested(family, case, ranks)
    assert checked, f"no layer of the cases can carry an adapter: {family!r}"
    for base in ("float", "nf4", "int8") if bases is None else bases:
        if base in family.bases:
            _check_stock(family, base)


def family_problems() -> Iterator[Problem]:
    """Yield the cases that `check_family` runs over by default."""
    for seed, kind in enumerate(INPUT_KINDS):
        yield make_problem(*_SHAPES[seed % len(_SHAPES)], kind, seed=seed)


def carried(family: Family, shape: tuple[int, int]) -> Iterator[int]:
    """Yield sizes that a layer of a shape can carry; one stands for all where the family has none."""
    for rank in _RANKS if family.default_rank is not None else _RANKS[:1]:
        try:
            family.shapes(shape, rank)
        except TargetError:
            continue
        yield rank


def objective_of(problem: Problem) -> tuple[Objective, Tensor]:
    """Return the objective of a layer that is rounded coarsely, and its quantized weight."""
    weight, statistics = problem.weight, problem.statistics
    step = weight.abs().max() / 3 or weight.new_ones(())
    base = (weight / step).round() * step
    return Objective(weight - base, gram(statistics), mean=statistics.mean, base=lambda: base), base


def _check_fit(family: Family, problem: Problem, rank: int) -> None:
    objective, base = objective_of(problem)
    where = f"{family!r}, rank {rank}, {problem.label}"
    fit = family.fit(objective, rank)
    total = objective.value_at_zero
    moment = problem.statistics.second_moment
    floor = 1e-6 * total + indefiniteness(objective.error, moment)
    shape = (base.shape[0], base.shape[1])
    found = {name: tuple(tensor.shape) for name, tensor in fit.correction.parameters.items()}
    assert found == family.shapes(shape, rank), f"parameters have shapes {found}: {where}"
    assert all(tensor.isfinite().all() for tensor in fit.correction.parameters.values()), f"not finite: {where}"

    measured = output_error(objective, fit.correction.change(base), problem.inputs)
    slack = rounding(measured, total, torch.float32, 64) + floor
    assert abs(measured - fit.error) <= slack, f"reports {fit.error}, achieves {measured}: {where}"
    assert measured <= total + slack, f"worse than no adapter ({measured} > {total}): {where}"
    blind = family.uncalibrated(objective, rank)
    assert measured <= blind.error + slack, f"worse than a fit without inputs ({measured} > {blind.error}): {where}"

    if not family.needs_base:
        tenfold = family.fit(replace(objective, error=10 * objective.error, base=None), rank)
        gap = abs(tenfold.error - 100 * fit.error)
        assert gap <= 100 * (0.05 * fit.error + slack), f"ten times the error has another solution: {where}"
    if family.stationary:
        _check_stationary(family, objective, fit, where)


def output_error(objective: Objective, change: Change, inputs: Tensor) -> float:
    """Return the mean over tokens of `|(E - C) x - b|^2`, from the inputs themselves."""
    left = inputs.double() @ (objective.error.double() - change.weight.double()).T
    if change.bias is not None:
        left = left - change.bias.double()
    return left.square().sum(1).mean().item()


def _check_stationary(family: Family, objective: Objective, fit: Fit, where: str) -> None:
    """Check that no small step lowers the error: the gradient is zero to the rounding of the solution."""
    parameters = {
        name: tensor.double().requires_grad_(name not in family.untrained)
        for name, tensor in fit.correction.parameters.items()
        if tensor.is_floating_point()
    }
    others = {name: tensor for name, tensor in fit.correction.parameters.items() if name not in parameters}
    with torch.enable_grad():
        change = family.change({**parameters, **others}, objective.base() if objective.base else None)
        left = objective.error.double() - change.weight
        value = (objective.metric.product(left) * left).sum()
        if change.bias is not None and objective.mean is not None:
            offset = left @ objective.mean.double()
            value = value - offset.square().sum() + (offset - change.bias).square().sum()
        trained = [tensor for tensor in parameters.values() if tensor.requires_grad]
        gradients = torch.autograd.grad(value, trained)
    steps = sum((gradient * tensor).abs().sum().item() for gradient, tensor in zip(gradients, trained, strict=True))
    limit = 1e-2 * objective.value_at_zero
    assert steps <= limit, f"the gradient is not zero at the solution ({steps} > {limit}): {where}"


def _check_nested(family: Family, problem: Problem, ranks: Sequence[int]) -> None:
    objective, _ = objective_of(problem)
    errors = [family.fit(objective, rank).error for rank in ranks]
    slack = 1e-4 * objective.value_at_zero
    for rank, error, before in zip(ranks[1:], errors[1:], errors, strict=False):
        assert error <= before + slack, f"a larger size is worse ({error} > {before}): {family!r}, rank {rank}"


def _check_stock(family: Family, base: StockBase) -> None:
    """Check that stock PEFT loads the files, computes the change of the family, and can train every tensor."""
    shape, rank = next((shape, rank) for shape in _SHAPES for rank in carried(family, shape))
    problem = make_problem(*shape, "decaying", seed=1)
    weight, statistics = problem.weight, problem.statistics
    quantized = dequantized(stock_layer(weight, base)) if base != "float" else objective_of(problem)[1]
    objective = Objective(weight - quantized, gram(statistics), mean=statistics.mean, base=lambda: quantized)
    correction = family.fit(objective, rank).correction
    for alpha in (None, 3.0 * rank) if family.scales else (None,):
        where = f"{family!r}, rank {rank}, lora_alpha {alpha}, on {base}"
        plain, loaded = (stock_layer(quantized if base == "float" else weight, base) for _ in range(2))
        inputs = problem.inputs.float()
        expected = plain.forward(inputs) + inputs @ correction.dense(quantized).expand_as(quantized).T
        bias = correction.change(quantized).bias
        expected = expected if bias is None else expected + bias
        adapted = load_stock(loaded, correction, rank, alpha).train()
        found = adapted(inputs)
        size = _TOLERANCE[base] * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=size, msg=lambda text: f"{where}: {text}")  # noqa: B023
        found.square().sum().backward()
        trained = [(name, part) for name, part in adapted.named_parameters() if part.requires_grad]
        assert trained, f"nothing can be trained: {where}"
        still = [name for name, part in trained if part.grad is None or not part.grad.any()]
        assert not still, f"no gradient reaches {still}: {where}"


def check_identity(family: Family, shape: tuple[int, int], rank: int) -> None:
    """Check that the start which changes nothing changes nothing."""
    problem = make_problem(*shape, seed=2)
    objective, base = objective_of(problem)
    start = family.identity(shape, rank, base)
    if start is not None:
        error = family.finished(objective, start).error
        total = objective.value_at_zero
        assert abs(error - total) <= 1e-5 * total, f"the identity changes the output ({error}, {total}): {family!r}"
        blind = replace(objective, metric=Identity(), mean=None)
        assert family.fit(blind, rank).error <= blind.value_at_zero * (1 + 1e-5), f"worse than no adapter: {family!r}"
