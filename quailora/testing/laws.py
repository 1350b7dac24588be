"""The laws of quantizers and solvers, and the cases that they are checked on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.metrics import gram
from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..core.weightings import WEIGHTINGS, FirstTokenWeighting, Sensitivity, TokenMeansWeighting, Weighting
from ..quantizers import Quantizer
from ..solvers import SVD, LowRank, Solver

InputKind = Literal["generic", "decaying", "rank-deficient", "single token", "dead channels", "massive channel"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)

_ALIKE = (TokenMeansWeighting, FirstTokenWeighting)  # Gram metrics of other tokens, which say nothing new of a solver


@final
@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """A weight with inputs to calibrate on.

    Attributes:
        weight: the full-precision weight `W`.
        inputs: rows are tokens; in float64 from `make_problem`, so that their Gram has no rounding error to speak of.
        label: how the inputs were made, for messages.
    """

    weight: Float[Tensor, "out_features in_features"]
    inputs: Float[Tensor, "tokens in_features"]
    label: str

    def __repr__(self) -> str:
        return f"Problem({self.label}, {self.weight.dtype})"

    @property
    def statistics(self) -> InputStatistics:
        """Second moment of the inputs."""
        return InputStatistics.from_inputs(self.inputs)


def make_problem(
    out_features: int, in_features: int, kind: InputKind = "generic", *, scale: float = 0.02, seed: int = 0
) -> Problem:
    """Return a random weight and random inputs of a given kind.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        kind: how the inputs are distributed; "massive channel" makes one channel 3000 times larger.
        scale: standard deviation of the weight.
        seed: seed of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(out_features, in_features, generator=generator)
    tokens = 1 if kind == "single token" else 2 * in_features + 8
    inputs = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64)
    # Spectra as language models have them, and the degenerate ones that calibration can meet: fewer directions than
    # channels, a single token, channels that are always zero, and one that is far louder than the rest.
    if kind == "decaying":
        mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5
        inputs = (inputs * torch.arange(1, in_features + 1) ** -1.0) @ mixing
    elif kind == "rank-deficient":
        few = max(1, in_features // 3)
        inputs = inputs[:, :few] @ torch.randn(few, in_features, generator=generator, dtype=torch.float64)
    elif kind == "dead channels":
        inputs[:, ::2] = 0
    elif kind == "massive channel":
        inputs[:, in_features // 2] *= 3000
    return Problem(weight, inputs, f"{kind} inputs, {out_features} x {in_features}, seed {seed}")


def standard_problems() -> Iterator[Problem]:
    """Yield the cases that the checks run over by default."""
    for seed, kind in enumerate(INPUT_KINDS):
        for out_features, in_features in ((24, 64), (64, 24), (5, 130), (1, 8)):
            yield make_problem(out_features, in_features, kind, seed=seed)


def optimal_error(
    error: Float[Tensor, "out_features in_features"],
    second_moment: Float[Tensor, "in_features in_features"],
    rank: int,
) -> float:
    """Return the least `tr((E - C) H (E - C)^T)` over corrections of a rank, by SciPy alone.

    Eckart-Young in the metric: the squared singular values of `E H^(1/2)` after the first `rank`. It shares no code
    with the solvers: a root from SciPy's eigendecomposition, and SciPy's singular values.
    """
    # With H = V D V^T, F = E V D^(1/2) has F F^T = E H E^T: its squared singular values are the eigenvalues of that,
    # and the optimum of rank r leaves all but the first r of them.
    values, vectors = scipy.linalg.eigh(second_moment.double().cpu().numpy())
    root = vectors * np.sqrt(values.clip(min=0))
    singular = scipy.linalg.svdvals(error.double().cpu().numpy() @ root)
    return float((singular[rank:] ** 2).sum())


def rounding(error: float, total: float, dtype: torch.dtype, epsilons: int = 8) -> float:
    """Return how much an error may change when the factors are rounded to `dtype`.

    A relative change `e` of `C` moves `tr((E - C) H (E - C)^T)` by at most `2 e sqrt(error * total) + e^2 total`, where
    `total` is the error without correction. Both factors are rounded, over all directions: `e` is taken for 8 machine
    epsilons, or more where whole iterations are computed in `dtype`.
    """
    # |E - C - dC|^2 <= (|E - C| + |dC|)^2 in the norm of the metric, with |dC| <= e |C| <= e |E| for a projection C.
    relative = epsilons * torch.finfo(dtype).eps
    return 2 * relative * math.sqrt(error * total) + relative**2 * total


def indefiniteness(
    error: Float[Tensor, "out_features in_features"], second_moment: Float[Tensor, "in_features in_features"]
) -> float:
    """Return how far `tr((E - C) H (E - C)^T)` can be off because `H` has eigenvalues a rounding error below zero.

    A Gram of float32 products can; the optimum, which is computed with those eigenvalues set to zero, does not see it.
    """
    lowest = float(torch.linalg.eigvalsh(second_moment)[0])
    return max(0.0, -lowest) * float(error.double().square().sum())


def made_sensitivity(error: Float[Tensor, "out_features in_features"]) -> Sensitivity:
    """Return weights of outputs and inputs from one to ten, for weightings that need gradients of a model."""
    rows, columns = (torch.linspace(1, 10, size, dtype=torch.float64) for size in error.shape)
    return Sensitivity(rows, columns)


def check_quantizer(quantizer: Quantizer, problem: Problem | None = None, *, idempotent: bool = False) -> None:
    """Check the laws of a quantizer.

    Args:
        quantizer: the quantizer.
        problem: one case; the standard cases if it is missing.
        idempotent: whether quantizing its own output again must change nothing (checked for float32 and float64).

    Raises:
        AssertionError: naming the law and the case.
    """
    for case in [problem] if problem else standard_problems():
        weight, statistics = case.weight, case.statistics
        where = f"{quantizer!r} on {case.label}, {weight.dtype}"
        before = weight.clone()
        quantized = quantizer.quantize(weight, statistics)
        torch.testing.assert_close(weight, before, rtol=0, atol=0, msg=f"changes the weight in place: {where}")
        restored = quantized.dequantize()
        assert restored.shape == weight.shape == quantized.shape, f"dequantize changes the shape: {where}"
        assert restored.dtype == weight.dtype, f"dequantize changes the dtype: {where}"
        assert restored.isfinite().all(), f"dequantize gives NaN or infinity: {where}"
        stored = sum(tensor.numel() * tensor.element_size() for tensor in quantized.tensors().values())
        assert quantized.nbytes == stored, f"nbytes is not the size of what is stored: {where}"
        residual, size = (weight - restored).double().norm(), weight.double().norm()
        # Zero in place of the weight is no worse than a base that is further away. A calibrated quantizer may go
        # further, since it moves weights that its inputs do not see.
        assert quantizer.needs_calibration or residual <= size, f"further from the weight than zero is: {where}"
        if idempotent and weight.dtype in {torch.float32, torch.float64}:
            again = quantizer.quantize(restored, statistics).dequantize()
            torch.testing.assert_close(again, restored, msg=f"not idempotent: {where}")


def check_solver(
    solver: Solver,
    problem: Problem | None = None,
    quantizer: Quantizer | None = None,
    weighting: Weighting | None = None,
) -> None:
    """Check the laws of a solver in a metric, or in each that quailora has, at ranks from 1 to full.

    Args:
        solver: the solver.
        problem: one case; the standard cases if it is missing.
        quantizer: makes the error; the weight itself is taken for the error if it is missing.
        weighting: chooses the metric that the solver works in; if None each of `WEIGHTINGS` in turn, but for those that
            are the Gram metric of other tokens.

    Raises:
        AssertionError: naming the law and the case.
    """
    weightings = [cls() for cls in WEIGHTINGS.values() if cls not in _ALIKE] if weighting is None else [weighting]
    for case in [problem] if problem else standard_problems():
        error, statistics = case.weight, case.statistics
        if quantizer is not None:
            error = case.weight - quantizer.quantize(case.weight, statistics).dequantize()
        error = error.to(torch.promote_types(error.dtype, torch.float32))
        for chosen in weightings:
            objective = chosen.objective(Objective(error, gram(statistics)), statistics, made_sensitivity(error))
            _check_ranks(solver, objective, f"{chosen!r}, {case.label}")


def _check_ranks(solver: Solver, objective: Objective, where: str) -> None:
    error = objective.error
    moment = objective.metric.product(torch.eye(error.shape[1], dtype=torch.float64))
    floor = 1e-9 * objective.value_at_zero + indefiniteness(error, moment)
    full = min(error.shape)
    previous = objective.value_at_zero
    for rank in sorted({1, 2, max(1, full // 2), full} & set(range(1, full + 1))):
        case = f"{solver!r}, rank {rank}, {where}"
        solution = solver.minimise(objective, rank)
        assert solution.rank == rank, f"returns rank {solution.rank}: {case}"
        _check_solution(solver, solution, objective, optimal_error(error, moment, rank), floor, case)
        slack = rounding(previous, objective.value_at_zero, error.dtype, 64) + floor
        raised = f"a higher rank is worse ({solution.error} > {previous}): {case}"
        assert solution.error <= previous + slack, raised
        previous = solution.error


def _check_solution(
    solver: Solver, solution: LowRank, objective: Objective, optimum: float, floor: float, where: str
) -> None:
    error, total, rank = objective.error, objective.value_at_zero, solution.rank
    assert solution.lora_A.shape == (rank, error.shape[1]), f"lora_A has shape {tuple(solution.lora_A.shape)}: {where}"
    assert solution.lora_B.shape == (error.shape[0], rank), f"lora_B has shape {tuple(solution.lora_B.shape)}: {where}"
    rows = 1.0 if objective.row_scale is None else objective.row_scale.double()
    measured = objective.metric.energy(error.double() - rows * solution.lora_B.double() @ solution.lora_A.double())
    tolerance = 1e-6 * measured + floor
    assert abs(measured - solution.error) <= tolerance, f"reports {solution.error}, achieves {measured}: {where}"
    slack = rounding(measured, total, error.dtype) + tolerance
    assert measured <= total + slack, f"worse than no correction ({measured} > {total}): {where}"

    assert measured >= optimum - tolerance, f"below the optimum ({measured} < {optimum}): {where}"
    if solver.needs_calibration:
        uncalibrated = SVD().minimise(objective, rank).error
        assert measured <= uncalibrated + slack, f"worse than the SVD ({measured} > {uncalibrated}): {where}"
        if rank == min(error.shape):
            assert measured <= slack, f"not zero at full rank ({measured} of {total}): {where}"
    assert (solution.lora_A.norm(dim=1) > 0).all(), f"a direction that cannot be trained: {where}"
