"""MiSS: a correction that repeats its first columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from ..core.linalg import semidefinite_solve
from ..core.objective import Objective
from .adapter import Change, Parameters, check_rank_for
from .base import Family
from .regression import base_of

_BLOCK = "miss_block"


@final
@dataclass(frozen=True)
class Miss(Family):
    """`C = miss_block^T P`, where `P` adds up every rank-th input (Kang and Yin, 2024, arXiv 2409.15371).

    Input `j` goes to the sum of number `j mod rank`. Where the rank does not divide the number of inputs, the last sums
    have one input less, as PEFT's padding with zeros makes it. A rank that is a multiple of another one can do all that
    the other one can. This is the plain form of PEFT's three, with `init_weights=True`.
    """

    name: ClassVar[str] = "miss"
    start_fields: ClassVar[frozenset[str]] = frozenset()  # init_weights chooses between PEFT's three forms
    peft_type: ClassVar[str] = "MISS"
    default_rank: ClassVar[int | None] = 64
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "hqq", "torchao"})

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_rank_for(self, rank, shape[1], shape)
        return {_BLOCK: (rank, shape[0])}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        # C = D P is best where (E - D P) H P^T = 0. Transposed, these are normal equations of the size of the rank,
        # (P H P^T) D^T = P H E^T, and D^T is the block that PEFT stores.
        error = objective.error.double()
        sums = torch.eye(rank, dtype=error.dtype, device=error.device)[:, columns(error.shape[1], rank, error)]
        weighted = objective.metric.product(sums)
        return {_BLOCK: semidefinite_solve(weighted @ sums.T, weighted @ error.T)}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        block = parameters[_BLOCK]
        return Change(block.T[:, columns(base_of(self, base).shape[1], len(block), block)])

    @override
    def output(
        self, parameters: Parameters, inputs: Float[Tensor, "*batch in_features"], base: Tensor | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        block = parameters[_BLOCK]
        padded = functional.pad(inputs, (0, -inputs.shape[-1] % len(block)))
        return padded.reshape(*inputs.shape[:-1], -1, len(block)).sum(-2) @ block

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": sizes["r"], "init_weights": True}


def columns(width: int, rank: int, like: Tensor) -> Tensor:
    """Return for each input the number of the sum that it goes to, on the device of another tensor."""
    return torch.arange(width, device=like.device) % rank
