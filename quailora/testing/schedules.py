"""The laws of schedules."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..families import Fit, Lora
from ..quantizers import GPTQ, QuantizedWeight, Quantizer
from ..schedules import Schedule
from ..schedules.layer import QuantizedLayer, Validation, difference
from ..solvers import Optimal, Solver
from .laws import Problem, rounding, standard_problems


def check_schedule(
    schedule: Schedule,
    problem: Problem | None = None,
    quantizer: Quantizer | None = None,
    solver: Solver | None = None,
    *,
    never_worse: bool = False,
) -> None:
    """Check the laws of a schedule at ranks 1 and half of the full one.

    - It accepts the quantizer, and the weight is not changed.
    - The quantized weight is finite, and in the format of the quantizer: of the same class, with tensors of the same
      shapes and dtypes. Tensors that a format leaves out where they are implied may be missing.
    - A schedule with `changes_base = False` gives what quantizing the weight alone gives.
    - The error that the result carries is `W - Q` of its quantized weight.
    - It solves for no more objectives than `solutions` says, that of the final correction included, since estimates of
      time trust it.

    Args:
        schedule: the schedule.
        problem: one case; the standard cases if it is None.
        quantizer: of the layer; GPTQ with 4 bits if it is None, which has what every schedule may ask for.
        solver: finds the corrections; the optimum if it is None.
        never_worse: whether the corrected layer must have no larger error than if its weight were quantized as it is.

    Raises:
        AssertionError: naming the law and the case.
        ConfigurationError: if the schedule does not work with the quantizer.
    """
    quantizer = quantizer or GPTQ(group_size=16)
    schedule.check(quantizer)
    for case in [problem] if problem else standard_problems():
        full = min(case.weight.shape)
        for rank in sorted({1, max(1, full // 2)}):
            layer = layer_of(case, quantizer, validated=schedule.needs_validation)
            where = f"{schedule!r}, rank {rank}, {case.label}"
            _check_choice(schedule, layer, solver or Optimal(), rank, where, never_worse=never_worse)


def layer_of(problem: Problem, quantizer: Quantizer, *, validated: bool = False) -> QuantizedLayer:
    """Return the layer of a problem, quantized as it is.

    Args:
        problem: weight and inputs.
        quantizer: quantizer of the layer.
        validated: whether a part of the tokens is held out, as asymmetric inputs have it. A single token is in both
            parts.
    """
    layer = QuantizedLayer.of(quantizer, problem.weight, problem.statistics)
    if not validated:
        return layer
    half = (len(problem.inputs) + 1) // 2
    held_out = InputStatistics.from_inputs(problem.inputs[-half:]).second_moment.double()
    fitted = QuantizedLayer.of(quantizer, problem.weight, InputStatistics.from_inputs(problem.inputs[:half]))

    def validation_error(weight: Tensor) -> float:
        error = problem.weight.double() - weight.double()
        return float(((error @ held_out) * error).sum())

    return replace(layer, validation=Validation(fitted, validation_error))


def stored_format(stored: QuantizedWeight) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Return class, shape and dtype of each stored tensor by its name."""
    kind = type(stored).__name__
    return {name: (kind, tuple(tensor.shape), tensor.dtype) for name, tensor in stored.tensors().items()}


def _check_choice(
    schedule: Schedule, layer: QuantizedLayer, solver: Solver, rank: int, where: str, *, never_worse: bool
) -> None:
    objectives: list[Objective] = []  # one that is solved for again knows its subspaces

    def solve(objective: Objective) -> Fit:
        objectives.append(objective)
        return Lora(solver).fit(objective, rank)

    before = layer.weight.clone()
    chosen = schedule.choose(layer, solve, rank)
    times = len({id(objective) for objective in (*objectives, chosen.objective)})
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0, msg=f"changes the weight in place: {where}")
    alone, quantized = layer.quantized.dequantize(), chosen.quantized.dequantize()
    assert quantized.shape == alone.shape, f"changes the shape to {tuple(quantized.shape)}: {where}"
    assert quantized.dtype == alone.dtype, f"changes the dtype to {quantized.dtype}: {where}"
    assert quantized.isfinite().all(), f"gives NaN or infinity: {where}"
    formats = [stored_format(one.quantized) for one in (layer, chosen)]
    shared = formats[0].keys() & formats[1].keys()
    others = [name for name in sorted(shared) if formats[0][name] != formats[1][name]]
    assert shared, f"gives a {type(chosen.quantized).__name__}: {where}"
    assert not others, f"gives another format, in which {others[:1]} differs: {where}"
    same = chosen.quantized.digest == layer.quantized.digest
    assert same or schedule.changes_base, f"changes the base, and changes_base is False: {where}"
    expected = difference(chosen.weight, chosen.quantized)
    torch.testing.assert_close(chosen.objective.error, expected, msg=f"carries the error of another weight: {where}")
    assert times <= schedule.solutions, f"solves for {times} objectives, and solutions is {schedule.solutions}: {where}"
    if never_worse:
        error, limit = solve(chosen.objective).error, solve(layer.objective).error
        slack = rounding(limit, layer.objective.value_at_zero, expected.dtype, 64)
        assert error <= limit + slack, f"worse than quantizing the weight as it is ({error} > {limit}): {where}"
