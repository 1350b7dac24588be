"""IA3: every output, or every input, of the quantized weight is scaled by a number of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from ..core.linalg import semidefinite_solve
from ..core.objective import Objective
from ..errors import check_choice
from .adapter import Change, Parameters
from .base import Family
from .linear import dense_metric
from .regression import base_in, base_of, quotient

Side = Literal["outputs", "inputs"]

_SCALES = "ia3_l"


@final
@dataclass(frozen=True)
class Ia3(Family):
    """`Q + C = diag(l) Q`, or `Q diag(l)` where inputs are scaled (Liu et al., 2022, arXiv 2205.05638).

    The error is a quadratic of `l - 1`, and its least value is found exactly: one regression for each output, or one
    for all inputs together. PEFT scales what the layer puts out, its own bias included, which the fit does not see.

    Attributes:
        scaled: "outputs", as PEFT does it by default, or "inputs", as it does it in the layers that its
            `feedforward_modules` names. All layers are scaled on the same side.
    """

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    needs_base: ClassVar[bool] = True
    moves_bias: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "torchao"})
    stationary: ClassVar[bool] = True

    scaled: Side = "outputs"

    def __post_init__(self) -> None:
        check_choice("a scaled side", self.scaled, get_args(Side))

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {_SCALES: (shape[0], 1) if self.scaled == "outputs" else (1, shape[1])}

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        return {name: torch.ones(size) for name, size in self.shapes(shape, rank).items()}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        base = base_in(self, objective)
        error, product = objective.error.double(), objective.metric.product
        if self.scaled == "outputs":
            # d = l - 1 leaves E_i - d_i Q_i of output i, a regression of one number: d_i = (E_i H Q_i) / (Q_i H Q_i).
            weighted = product(base)
            steps = quotient((weighted * error).sum(1), (weighted * base).sum(1))[:, None]
        else:
            # |E - Q diag(d)|^2 = |E|^2 - 2 d . diag(Q^T E H) + d . ((Q^T Q) o H) d, with the product o of entries.
            system = (base.T @ base) * dense_metric(objective.metric, base)
            steps = semidefinite_solve(system, (base * product(error)).sum(0)[:, None]).T
        return {_SCALES: 1 + steps}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        scales = parameters[_SCALES]
        return Change((scales - 1) * base_of(self, base).to(scales))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        # PEFT takes text for a regular expression that names of layers have to match: any name, or the empty one.
        return {"feedforward_modules": ".*" if self.scaled == "inputs" else ""}
