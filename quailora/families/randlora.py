"""RandLoRA: a sum of random low-rank matrices with two trained scalings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.metrics import Identity
from ..core.objective import Objective
from .adapter import Change, Parameters
from .base import Family
from .linear import dense_metric
from .projections import check_key, drawn_rows
from .regression import base_of
from .scalings import Equations

_ROUNDS = 3  # further ones gain about one percent of the error each

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"


@final
@dataclass(frozen=True)
class RandLora(Family):
    """`C = Z diag(lambda) (A o gamma)`, or its transpose (Albert et al., 2025, arXiv 2502.00987).

    `Z` and `A` are random and are not trained. Row `(v, j)` of `A o gamma` is row `v` of `A` times row `j` of gamma,
    for each `v` below the rank and for as many bases `j` as make up the shorter side of the layer, which is that of
    `A`. So a smaller rank has more trained numbers. Either scaling, given the other one, solves linear equations, and
    both are solved in turn. The projections are in the file once for all layers, as in PEFT's files from its pull
    request 3714 on. PEFT 0.21 loads them so, but warns: its own files have a copy in each layer, too.

    Attributes:
        projection_prng_key: seed of the projections.
    """

    name: ClassVar[str] = "randlora"
    peft_type: ClassVar[str] = "RANDLORA"
    default_rank: ClassVar[int | None] = 32
    scales: ClassVar[bool] = True

    projection_prng_key: int = 0

    def __post_init__(self) -> None:
        check_key(self.projection_prng_key)

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        bases = -(-min(shape) // rank)
        return {_LAMBDA: (rank, bases), _GAMMA: (bases, min(shape))}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        scalings, columns = self.shapes(shape, rank).values()
        return {_LAMBDA: torch.zeros(scalings), _GAMMA: torch.full(columns, 1 / max(columns))}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        # Let U = diag(lambda) (A o gamma). The gain is 2 <U, R> - <U, J U G> with J = Z^T Z, R = Z^T E H and G = H, or
        # with J = Z^T H Z, R = Z^T H E^T and the identity for G where C is the transpose.
        error, metric = objective.error.double(), objective.metric
        wide = error.shape[0] < error.shape[1]
        small, large = self._projections((error.shape[0], error.shape[1]), rank, error)
        weighted = metric.product(large.T) if wide else large.T
        right = weighted @ (error.T if wide else metric.product(error))
        side = None if wide or isinstance(metric, Identity) else dense_metric(metric, error)
        equations = Equations(small, weighted @ large, right, side)
        gamma = torch.ones(-(-len(small.T) // rank), len(small.T), dtype=error.dtype, device=error.device)
        scalings, gain = equations.best_lambda(gamma)
        for _ in range(_ROUNDS):
            gamma = equations.best_gamma(scalings, gamma, objective.value_at_zero - gain)
            scalings, gain = equations.best_lambda(gamma)
        factor = gamma.square().mean().sqrt() * max(gamma.shape)  # they share one scale: gamma has that of PEFT's start
        return {_LAMBDA: scalings * factor, _GAMMA: gamma / factor}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        scalings, gamma = parameters[_LAMBDA], parameters[_GAMMA]
        shape = (base_of(self, base).shape[0], base_of(self, base).shape[1])
        small, large = self._projections(shape, len(scalings), gamma)
        change = large @ (scalings[:, :, None] * small[:, None] * gamma).flatten(0, 1)
        return Change(change if shape[0] >= shape[1] else change.T)

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        key = {"projection_prng_key": self.projection_prng_key, "save_projection": True}
        return {"r": sizes["r"], "randlora_alpha": sizes["lora_alpha"], **key}

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return alpha / rank

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return {**parameters, _LAMBDA: (parameters[_LAMBDA].double() / scale).float()}

    @override
    def shared(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> Parameters:
        largest = (max(rows for rows, _ in shapes.values()), max(columns for _, columns in shapes.values()))
        small, large = self._projections(largest, rank, torch.empty(0))
        return {
            "base_model.randlora_A": small[:, None],
            "base_model.randlora_B": large.reshape(len(large), -1, rank),
        }

    def _projections(
        self, shape: tuple[int, int], rank: int, like: Tensor
    ) -> tuple[Float[Tensor, "rank shorter"], Float[Tensor, "longer products"]]:
        """Return the parts of `A` and `Z` that a layer uses, in the dtype and on the device of another tensor."""
        # Their entries have a variance of 4/3, and of 1 in PEFT. Each base has a seed of its own, so that more bases
        # leave the first ones as they are.
        seed = self.projection_prng_key << 24
        small = drawn_rows(min(shape), rank, seed).T
        large = [drawn_rows(max(shape), rank, seed + 1 + base) for base in range(-(-min(shape) // rank))]
        return 2 * small.to(like), 2 * torch.cat(large, dim=1).to(like)
