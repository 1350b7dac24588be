"""DoRA: LoRA whose rows are scaled, together with those of the quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.objective import Objective
from ..solvers import Optimal, Solver
from .adapter import Change, Parameters
from .base import Family
from .lora import divided_factors, lora_scale, low_rank_shapes, parameters_of
from .regression import base_in, base_of

_ROUNDS = 2  # further ones gain less than a thousandth of the error in layers of SmolLM2
_TINY = 1e-4  # in lora_B, for an output whose weights are all zero

_MAGNITUDE = "lora_magnitude_vector"


@final
@dataclass(frozen=True)
class Dora(Family):
    """`Q + C = diag(m / |V|) V` with `V = Q + lora_B @ lora_A` and the norms `|V|` of its rows (arXiv 2402.09353).

    With `d = m / |V|` the error is that of `diag(d) V`. Given `V` each `d_i` is a regression of one output, and given
    `d` the product `diag(d) lora_B lora_A` is the best low-rank correction of `W - diag(d) Q`. Both are solved in turn.
    A magnitude of `|W|`, the norms in full precision, is worse than this in layers of SmolLM2.

    Attributes:
        solver: finds the low-rank part.
    """

    name: ClassVar[str] = "dora"
    peft_type: ClassVar[str] = "LORA"
    default_rank: ClassVar[int | None] = 16
    scales: ClassVar[bool] = True
    has_rslora: ClassVar[bool] = True
    has_patterns: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True

    solver: Solver = Optimal()  # noqa: RUF009 # frozen

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {**low_rank_shapes(self, shape, rank), _MAGNITUDE: (shape[0],)}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        zeros = {name: torch.zeros(size) for name, size in self.shapes(shape, rank).items()}
        return {**zeros, _MAGNITUDE: norms(base_of(self, base).double())}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        base = base_in(self, objective)
        weight = base + objective.error.double()
        rows = torch.ones(len(base), 1, dtype=torch.float64, device=base.device)
        for _ in range(_ROUNDS):
            found = self.solver.minimise(replace(objective, error=(weight - rows * base).float()), rank)
            lora_B = found.lora_B / rows.float()
            lora_B[:, 0] += torch.where(base.any(1) | lora_B.any(1), 0, _TINY)  # PEFT divides by the norm of each row
            total = base + lora_B.double() @ found.lora_A.double()
            rows = regression(weight, total, objective)
        return {**parameters_of(found), "lora_B.weight": lora_B, _MAGNITUDE: rows[:, 0] * norms(total)}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        base = base_of(self, base).to(parameters[_MAGNITUDE])
        total = base + parameters["lora_B.weight"] @ parameters["lora_A.weight"]
        # PEFT takes the norm for a constant in the backward pass, as section 4.3 of the paper says.
        rows = parameters[_MAGNITUDE] / norms(total).detach().clamp(min=torch.finfo(total.dtype).tiny)
        return Change(rows[:, None] * total - base)

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {**sizes, "use_dora": True, "lora_bias": False}

    @override
    def with_solver(self, solver: Solver) -> Dora:
        return replace(self, solver=solver)

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return lora_scale(alpha, rank, rslora=rslora)

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return divided_factors(parameters, scale)  # the magnitude is that of Q + scale * B A, which stays as it was


def norms(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Return the norm of each row."""
    found: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return found


def regression(
    weight: Float[Tensor, "rows columns"], total: Float[Tensor, "rows columns"], objective: Objective
) -> Float[Tensor, "rows 1"]:
    """Return for each row the factor `d_i > 0` with the least error `|W_i - d_i V_i|`; 1 where there is none.

    Args:
        weight: `W`.
        total: `V = Q + B A`.
        objective: has the metric.
    """
    weighted = objective.metric.product(total)
    over, under = (weighted * weight).sum(1), (weighted * total).sum(1)
    found = over / torch.where(under > 0, under, 1)
    return torch.where((under > 0) & (found > 0), found, 1.0)[:, None]
