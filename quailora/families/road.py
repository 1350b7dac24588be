"""RoAd: pairs of outputs of the quantized weight are rotated and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import semidefinite_solve
from ..core.objective import Objective
from ..errors import ConfigurationError, TargetError, check_choice
from .adapter import Change, Parameters
from .base import Family
from .regression import base_in, base_of, quotient

Variant = Literal["road_1", "road_2", "road_4"]

_WIDTHS = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # angles for each output

_ANGLES, _LENGTHS = "road_theta", "road_alpha"


@final
@dataclass(frozen=True)
class Road(Family):
    """`Q + C = diag(c) Q + diag(s) P Q`, where `P` turns each pair of outputs by a right angle.

    (Liao and Monz, 2024, arXiv 2409.00119.) With `c = alpha cos(theta)` and `s = alpha sin(theta)` of each output the
    error is a quadratic of `c` and `s`, so that their best values are regressions of two numbers. PEFT turns what the
    layer puts out, its own bias included, which the fit does not see.

    Attributes:
        variant: "road_1" has an angle and a length for each pair of outputs, "road_2" for each output, and "road_4"
            two of each, which can do what "road_2" can do.
        group_size: in each group of so many outputs, those of the first half are paired with those of the second.
    """

    name: ClassVar[str] = "road"
    peft_type: ClassVar[str] = "ROAD"
    needs_base: ClassVar[bool] = True
    moves_bias: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "torchao"})
    stationary: ClassVar[bool] = True

    variant: Variant = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        check_choice("a variant", self.variant, get_args(Variant))
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigurationError(f"Expected a group_size that is even and positive, got {self.group_size}.")

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        if shape[0] % self.group_size:
            raise TargetError(
                f"Expected outputs in whole groups of group_size={self.group_size} for road, got a layer of {shape[0]}."
            )
        size = (round(_WIDTHS[self.variant] * shape[0]),)
        return {_ANGLES: size, _LENGTHS: size}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        size = self.shapes(shape, rank)[_ANGLES]
        return {_ANGLES: torch.zeros(size), _LENGTHS: torch.ones(size)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        base, error = base_in(self, objective), objective.error.double()
        turned = self._turned(base)
        # Inner products in the metric of each row of E, Q and P Q with the two rows that the output is made of.
        rows, others = objective.metric.product(base), objective.metric.product(turned)
        right = torch.stack(((rows * error).sum(1), (others * error).sum(1)), dim=1)
        size, mixed, other = (rows * base).sum(1), (rows * turned).sum(1), (others * turned).sum(1)
        if self.variant == "road_1":
            # The two outputs of a pair share both numbers. Their regressors are orthogonal and of equal size: the
            # mixed products of the pair cancel, and its sizes are the same two numbers.
            pairs = self._pairs(right).sum(1).flatten(0, 1)
            steps = quotient(pairs, self._pairs(size).sum(1).flatten()[:, None].expand_as(pairs))
        else:
            system = torch.stack((size, mixed, mixed, other), dim=1).view(-1, 2, 2)
            steps = semidefinite_solve(system, right[:, :, None])[:, :, 0]
        cosine, sine = 1 + steps[:, 0], steps[:, 1]
        angles, lengths = torch.atan2(sine, cosine), torch.hypot(sine, cosine)
        if self.variant == "road_4":  # the same angle and length for both terms of an output, so that all are trained
            angles, lengths = (self._groups(each).expand(-1, 2, -1).flatten() for each in (angles, lengths))
        return {_ANGLES: angles, _LENGTHS: lengths}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        angles, lengths = parameters[_ANGLES], parameters[_LENGTHS]
        cosine, sine = lengths * angles.cos(), lengths * angles.sin()
        if self.variant == "road_1":
            cosine, sine = (part.view(-1, 1, self.group_size // 2).expand(-1, 2, -1) for part in (cosine, sine))
        elif self.variant == "road_4":  # the first half of each group is for the cosines, the second for the sines
            cosine, sine = (cosine.view(-1, 2, self.group_size)[:, 0], sine.view(-1, 2, self.group_size)[:, 1])
        weight = base_of(self, base).to(angles)
        return Change((cosine.reshape(-1, 1) - 1) * weight + sine.reshape(-1, 1) * self._turned(weight))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"variant": self.variant, "group_size": self.group_size}

    def _groups(self, numbers: Float[Tensor, " out_features"]) -> Float[Tensor, "groups 1 group_size"]:
        return numbers.view(-1, 1, self.group_size)

    def _pairs(self, rows: Float[Tensor, "out_features *rest"]) -> Float[Tensor, "groups 2 half *rest"]:
        return rows.view(-1, 2, self.group_size // 2, *rows.shape[1:])

    def _turned(self, rows: Float[Tensor, "out_features columns"]) -> Float[Tensor, "out_features columns"]:
        """Return `P` times a matrix: its row is minus the second of the pair for the first, and the first for it."""
        first, second = self._pairs(rows).unbind(1)
        return torch.stack((-second, first), dim=1).view_as(rows)
