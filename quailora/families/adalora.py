"""AdaLoRA: the correction of LoRA as a singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor
from typing_extensions import override

from ..core.linalg import product_svd
from ..core.objective import Objective
from ..errors import ConfigurationError
from ..solvers import Optimal, Solver
from .adapter import Change, Parameters, check_rank_for
from .base import Family

_GUARD = 1e-5  # PEFT divides by the rank plus this


@final
@dataclass(frozen=True)
class AdaLora(Family):
    """`C = lora_B diag(lora_E) lora_A` (Zhang et al., 2023, arXiv 2303.10512).

    The factors are the singular vectors of the correction, and `lora_E` its singular values: the penalty of AdaLoRA
    pulls both factors to orthonormal ones, which balanced factors are not.

    Attributes:
        solver: finds the correction.
        total_step: updates of the training that follows, over which PEFT lowers the ranks.
        target_r: mean rank at the end of that training; the rank of the start by default, which prunes nothing.
        tinit: updates before the first direction is pruned.
        tfinal: updates at the end in which no direction is pruned.
    """

    name: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    default_rank: ClassVar[int | None] = 12
    scales: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    stationary: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "gptq"})

    solver: Solver = Optimal()  # noqa: RUF009 # frozen
    total_step: int = 1000
    target_r: int | None = None
    tinit: int = 0
    tfinal: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tinit < self.total_step - self.tfinal <= self.total_step:
            raise ConfigurationError(
                f"Expected tinit and tfinal of at least 0 that leave some of total_step={self.total_step} updates, got "
                f"{self.tinit} and {self.tfinal}."
            )

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_rank_for(self, rank, min(shape), shape)
        return {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank), "lora_E": (rank, 1)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        found = self.solver.minimise(objective, rank)
        left, singular, right = product_svd(found.lora_B.double(), found.lora_A.double())
        return {"lora_A": right, "lora_B": left, "lora_E": singular[:, None]}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        return Change(parameters["lora_B"] @ (parameters["lora_A"] * parameters["lora_E"]))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "init_r": sizes["r"],
            "target_r": self.target_r or sizes["r"],
            "lora_alpha": sizes["lora_alpha"],
            "total_step": self.total_step,
            "tinit": self.tinit,
            "tfinal": self.tfinal,
        }

    @override
    def with_solver(self, solver: Solver) -> AdaLora:
        return replace(self, solver=solver)

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return alpha / (rank + _GUARD)  # PEFT takes the whole alpha, and divides by the rank that is left

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return {**parameters, "lora_E": (parameters["lora_E"].double() / scale).float()}
