"""No correction: the start of plain QLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from typing_extensions import override

from ..core.objective import Factors, Objective
from .base import LowRank, Solver, finish


@final
@dataclass(frozen=True)
class Zero(Solver):
    """Plain QLoRA: `lora_B = 0`, `lora_A` uniform in `+-1/sqrt(in_features)` from torch's global generator.

    Equivalent to PEFT's `init_lora_weights=True`. Source: Dettmers et al., QLoRA, 2023, arXiv 2305.14314.
    """

    name: ClassVar[str] = "zero"

    needs_calibration: ClassVar[bool] = False

    @override
    def minimise(self, objective: Objective, rank: int) -> LowRank:
        error = objective.error
        return finish(objective, Factors(error.new_zeros(error.shape[0], rank), error.new_zeros(rank, error.shape[1])))
