"""LoRA: a low-rank correction, found by any solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from ..core.metrics import Identity
from ..core.objective import Deferred, Factors, Objective
from ..solvers import LowRank, Optimal, Solver
from .adapter import Change, Correction, Parameters, check_rank_for
from .base import Family, Fit

EVERY_BASE = frozenset({"float", "nf4", "int8", "gptq", "awq", "hqq", "torchao"})
"""All bases that stock PEFT computes LoRA on."""


@final
@dataclass(frozen=True)
class Lora(Family):
    """`C = lora_B @ lora_A` (Hu et al., 2021, arXiv 2106.09685), rank-stabilised scaling and patterns included.

    Attributes:
        solver: finds the correction.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    default_rank: ClassVar[int | None] = 16
    scales: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    stationary: ClassVar[bool] = True
    has_rslora: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = EVERY_BASE

    solver: Solver = Optimal()  # noqa: RUF009 # frozen

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return low_rank_shapes(self, shape, rank)

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        return parameters_of(self.solver.minimise(objective, rank))

    @override
    def fit(self, objective: Objective, rank: int) -> Fit:
        found = self.solver.minimise(objective, rank)  # which compares with the SVD itself, and takes weighted outputs
        return Fit(lora_correction(found, found.energies), Deferred(lambda: found.error), found.iterations, found)

    @override
    def uncalibrated(self, objective: Objective, rank: int) -> Fit:
        factors = objective.projection(objective.subspace(rank, Identity()))
        return Fit(lora_correction(factors), Deferred(lambda: objective.value(*factors)))

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        return Change(parameters["lora_B.weight"] @ parameters["lora_A.weight"])

    @override
    def output(
        self, parameters: Parameters, inputs: Float[Tensor, "*batch in_features"], base: Tensor | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        # Two thin products: the dense correction is never formed.
        return functional.linear(functional.linear(inputs, parameters["lora_A.weight"]), parameters["lora_B.weight"])

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {**sizes, "use_dora": False, "lora_bias": False}

    @override
    def with_solver(self, solver: Solver) -> Lora:
        return replace(self, solver=solver)

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return lora_scale(alpha, rank, rslora=rslora)

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return divided_factors(parameters, scale)


def lora_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return what PEFT multiplies the product of the two factors by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def low_rank_shapes(family: Family, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the two factors of LoRA.

    Raises:
        TargetError: if the layer has fewer rows or columns than the rank.
    """
    check_rank_for(family, rank, min(shape), shape)
    return {"lora_A.weight": (rank, shape[1]), "lora_B.weight": (shape[0], rank)}


def lora_correction(found: LowRank | Factors, energies: Tensor | None = None) -> Correction:
    """Return the correction of two factors, before PEFT's scaling.

    Args:
        found: what a solver has found, or its factors.
        energies: energy of each direction, see `LowRank`.
    """
    return Correction(Lora(), parameters_of(found), (len(found.lora_B), found.lora_A.shape[1]), energies)


def parameters_of(found: LowRank | Factors) -> dict[str, Tensor]:
    """Return factors by the ends of their names in PEFT's files."""
    return {"lora_A.weight": found.lora_A, "lora_B.weight": found.lora_B}


def divided_factors(parameters: Parameters, scale: float) -> dict[str, Tensor]:
    """Return parameters whose two factors are each divided by the root of a scale, which keeps them balanced.

    Directions that do nothing yet stay as they are, so that they start as in plain LoRA whatever the scale.
    """
    lora_A, lora_B = (parameters[name].double() for name in ("lora_A.weight", "lora_B.weight"))
    root = math.sqrt(scale)
    roots = torch.where((lora_B != 0).any(0), root, 1.0)[:, None]
    return {**parameters, "lora_A.weight": (lora_A / roots).float(), "lora_B.weight": (lora_B / root).float()}
