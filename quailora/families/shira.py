"""SHiRA: a sparse correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from ..core.objective import Objective
from ..errors import check_choice
from .adapter import Change, Parameters, check_rank_for
from .base import Family
from .linear import dense_metric
from .regression import base_of
from .sparse import allocated, largest, pursuit, regression, spread

Support = Literal["pursuit", "adaalloc"]
"""How the places of entries are chosen."""

_WEIGHT, _INDICES = "shira_weight", "shira_indices"


@final
@dataclass(frozen=True)
class Shira(Family):
    """`C` with `rank * (out_features + in_features)` entries other than zero (Bhardwaj et al., 2024, arXiv 2406.13175).

    PEFT draws the places of the entries, but its files hold them, so that they can be chosen: rounds of matching
    pursuit take those with the largest gains, and each round finds the values of all entries anew, which is one
    regression for each output. Without inputs the best entries are the largest ones of the error. PEFT's layer adds the
    entries to a dense copy of the weight in each pass. On int8 this copy is in float32, and so have to be the inputs,
    unless the pass is under autocast.

    Attributes:
        support: how places are chosen. "pursuit" is what is said above. "adaalloc" is the rule of QWHA (Jeon et al.,
            2025, arXiv 2509.17428): each output gets entries in proportion to the norm of its error, and among its
            inputs those whose error has the most power. QWHA itself does so after a Walsh-Hadamard transform, which
            stock PEFT does not have. The values are found by the same regression.
    """

    name: ClassVar[str] = "shira"
    peft_type: ClassVar[str] = "SHIRA"
    runs_empty: ClassVar[bool] = False
    default_rank: ClassVar[int | None] = 32
    nested: ClassVar[bool] = True
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    untrained: ClassVar[frozenset[str]] = frozenset({_INDICES})
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "torchao"})

    support: Support = "pursuit"

    def __post_init__(self) -> None:
        check_choice("a support", self.support, get_args(Support))

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_rank_for(self, rank, math.prod(shape) // sum(shape), shape)
        return {_WEIGHT: (rank * sum(shape),), _INDICES: (2, rank * sum(shape))}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        count = rank * sum(shape)
        places = torch.stack(torch.unravel_index(spread(count, math.prod(shape)), shape))
        return {_WEIGHT: torch.zeros(count), _INDICES: places.int()}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        error = objective.error.double()
        count = rank * sum(error.shape)
        rooted = objective.metric.rooted(error)
        if rooted is not None:
            # Entries of the error do not meet in a diagonal metric: each one that C takes is one less in the error.
            taken = allocated(error, rooted, count) if self.support == "adaalloc" else largest(rooted, count)
            places = taken.nonzero().T
            return {_WEIGHT: error[tuple(places)], _INDICES: places.int()}
        # For inputs of power one, x_j / root_j, the correction is C diag(root), and H has ones on its diagonal. Inputs
        # that are always zero have zeros there, and get entries of zero.
        metric = dense_metric(objective.metric, error)
        root = metric.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(root > 0, 1 / root, 0)
        target, metric = objective.metric.product(error) * inverse, metric * inverse * inverse[:, None]
        if self.support == "adaalloc":
            places, values = regression(allocated(error, error * root, count), target, metric)
            return {_WEIGHT: values * inverse[places[1]], _INDICES: places.int()}
        taken, blind = pursuit(target, metric, count), largest(error, count)
        places, values = regression(taken, target, metric)
        # C gains 2 <C, E H> - <C, C H>, which is <C, E H> if it solves its equations. Where hardly any inputs are
        # correlated, the largest entries of the error can gain more than those of the pursuit.
        plain = error * root * blind
        if (plain * (2 * target - plain.to_sparse() @ metric)).sum() > (values * target[tuple(places)]).sum():
            places, values = regression(blind, target, metric)
        return {_WEIGHT: values * inverse[places[1]], _INDICES: places.int()}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        row, column = parameters[_INDICES].long()
        values = parameters[_WEIGHT]
        return Change(values.new_zeros(base_of(self, base).shape).index_put((row, column), values))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": sizes["r"], "mask_type": "random", "init_weights": True}
