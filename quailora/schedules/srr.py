"""Quantize the weight without its leading directions, which go to the correction: SRR (2026, arXiv 2602.02001)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from typing_extensions import override

from ..core.linalg import uniform
from ..core.objective import Objective
from .base import Schedule, Solve, better
from .layer import QuantizedLayer


@final
@dataclass(frozen=True)
class SRR(Schedule):
    """Take the leading `k` directions of the weight off before quantizing (SRR, Preserve-then-quantize).

    `k` minimises `rho_k(W) rho_(r-k)(N)`. Here `rho_p(M)` is the share of the energy of `M` outside of its `p` leading
    directions in the metric, and `N` is uniform noise that stands for the rounding error, which is not known yet.
    """

    name: ClassVar[str] = "srr"

    @property
    @override
    def solutions(self) -> int:
        return 5  # subspaces of the weight and of the noise, both bases, and the better one

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        weight = layer.objective_of(layer.weight)
        noise = uniform(layer.weight.shape, layer.objective.error, seed=0)
        preserved = preserved_rank(weight, layer.objective_of(noise), rank)
        if not preserved:
            return layer
        basis, coefficients = weight.projection(weight.subspace(rank).leading(preserved))
        return better(layer, layer.requantized(layer.weight - basis @ coefficients), solve)


def preserved_rank(weight: Objective, noise: Objective, rank: int) -> int:
    """Return how many directions of the weight to take off; see `SRR`."""
    # k directions go to the weight and r - k to the rounding error that follows. Rounding what is left of the weight
    # makes an error in proportion to its energy, rho_k(W), of which a correction of rank r - k leaves rho_(r-k)(N). The
    # product of both is what remains in the end, as a share of the energy of W. `flip` lines k up with r - k.
    tails = []
    for objective in (weight, noise):
        total, energies = objective.value_at_zero, objective.subspace(rank).energies
        tails.append(1 - torch.cat([energies.new_zeros(1), energies.cumsum(0)]) / total if total > 0 else None)
    if tails[0] is None or tails[1] is None:
        return 0
    return int((tails[0] * tails[1].flip(0)).argmin())
