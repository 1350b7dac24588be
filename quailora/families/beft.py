"""BEFT: a bias alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from ..core.objective import Objective
from .adapter import Change, Parameters
from .base import Family


@final
@dataclass(frozen=True)
class Beft(Family):
    """A bias `b = E mu` in each layer, with the mean `mu` of the inputs; PEFT's BEFT.

    It takes away the part of the error that is the same for every token, with one number for each output.
    """

    name: ClassVar[str] = "beft"
    peft_type: ClassVar[str] = "BEFT"
    needs_mean: ClassVar[bool] = True
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {"beft_bias": (1, shape[0])}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        if objective.mean is None:
            return {"beft_bias": torch.zeros(1, len(objective.error))}
        return {"beft_bias": (objective.error.double() @ objective.mean.double())[None]}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        bias = parameters["beft_bias"][0]
        return Change(bias.new_zeros(1, 1), bias)

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {}
