"""LoRA with a bias of its own, PEFT's `lora_bias`: the bias takes the mean of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from ..core.objective import Objective
from ..solvers import Optimal, Solver
from .adapter import Change, Parameters
from .base import Family
from .lora import divided_factors, lora_scale, low_rank_shapes, parameters_of


@final
@dataclass(frozen=True)
class LoraBias(Family):
    """`C = lora_B @ lora_A` and a bias `b`, by `LoraConfig(lora_bias=True)`.

    For any `C` the best bias is `(E - C) mu`, with the mean `mu` of the inputs. What is left is
    `tr((E - C) (H - mu mu^T) (E - C)^T)`, so that the best `C` is that of plain LoRA for inputs about their mean.

    Attributes:
        solver: finds the low-rank part.
    """

    name: ClassVar[str] = "lora_bias"
    peft_type: ClassVar[str] = "LORA"
    default_rank: ClassVar[int | None] = 16
    scales: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    stationary: ClassVar[bool] = True
    has_rslora: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True

    solver: Solver = Optimal()  # noqa: RUF009 # frozen

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {**low_rank_shapes(self, shape, rank), "lora_B.bias": (shape[0],)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        if objective.mean is None:
            found = self.solver.minimise(objective, rank)
            return {**parameters_of(found), "lora_B.bias": torch.zeros(len(objective.error))}
        metric, mean = objective.metric.centered(objective.mean), objective.mean.double()
        found = self.solver.minimise(replace(objective, metric=metric), rank)
        bias = objective.error.double() @ mean - found.lora_B.double() @ (found.lora_A.double() @ mean)
        return {**parameters_of(found), "lora_B.bias": bias}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        return Change(parameters["lora_B.weight"] @ parameters["lora_A.weight"], parameters["lora_B.bias"])

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {**sizes, "use_dora": False, "lora_bias": True}

    @override
    def with_solver(self, solver: Solver) -> LoraBias:
        return replace(self, solver=solver)

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return lora_scale(alpha, rank, rslora=rslora)

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        # PEFT adds scale * (lora_B (lora_A x) + bias): the product has two factors to divide, the bias is one.
        bias = (parameters["lora_B.bias"].double() / scale).float()
        return {**divided_factors(parameters, scale), "lora_B.bias": bias}
