"""What families share whose correction has several low-rank parts, which are found in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.linalg import repaired_cholesky
from ..core.metrics import Gram, Identity, Metric
from ..core.objective import Factors, Objective
from ..solvers import Solver

_ROUNDS = 4
_LEAST_GAIN = 1e-3  # of the error: a round that gains less is the last one
_RIDGE = 1e-8  # of the diagonal, for inputs that are copies of each other


class Part(NamedTuple):
    """A part of a correction.

    Attributes:
        rows: its outputs.
        columns: its inputs.
        rank: its rank.
        metric: `H` of its inputs.
        divide: returns `G H^-1` for this `H`; None if no other inputs of the layer are correlated with these.
    """

    rows: slice
    columns: slice
    rank: int
    metric: Metric
    divide: Callable[[Tensor], Tensor] | None = None


def parts_of(
    dense: Float[Tensor, "columns columns"] | None, rows: Sequence[slice], columns: slice, rank: int
) -> list[Part]:
    """Return parts with the same inputs.

    Args:
        dense: `H` of all inputs; None for the identity.
        rows: the outputs of each part.
        columns: the inputs.
        rank: rank of each part.
    """
    if dense is None:
        return [Part(each, columns, rank, Identity()) for each in rows]
    own = dense[columns, columns]
    # With ones on the diagonal a ridge is small against every direction, however loud single inputs are. Inputs that
    # are always zero have nothing but zeros in H, and in what is divided by it.
    powers = own.diagonal()
    roots = torch.where(powers > 0, powers, 1).sqrt()
    scaled = own / roots / roots[:, None]
    scaled.diagonal().fill_(1 + _RIDGE)
    factor, _ = repaired_cholesky(scaled)

    def divide(matrix: Tensor) -> Tensor:
        return torch.cholesky_solve((matrix / roots).T, factor).T / roots

    metric = Gram(own)
    return [Part(each, columns, rank, metric, divide) for each in rows]


def alternated(
    error: Float[Tensor, "rows columns"],
    dense: Float[Tensor, "columns columns"] | None,
    parts: Sequence[Part],
    solver: Solver,
    start: Sequence[Factors] = (),
) -> list[Factors]:
    """Return the factors of each part, which are found in turn.

    Args:
        error: `E`, in float64.
        dense: `H`; None for the identity.
        parts: the parts, in the order in which they are found.
        solver: finds one part.
        start: factors of each part to begin with. There are none if no part depends on another one, so that one round
            is enough.
    """
    left = error.clone()  # E - C
    pull = left if dense is None else left @ dense  # (E - C) H
    found = list(start)

    def add(part: Part, factors: Factors, sign: int) -> None:
        lora_B, lora_A = sign * factors.lora_B.double(), factors.lora_A.double()
        left[part.rows, part.columns] += lora_B @ lora_A
        if dense is not None:
            pull[part.rows] += lora_B @ (lora_A @ dense[part.columns])

    for part, factors in zip(parts, start, strict=False):
        add(part, factors, -1)
    # Without one part, whose inputs are y, R is left of the error. The best such part of any rank is
    # X = R H_y H_yy^-1, where H_y are the columns y of H. One of lower rank, C, leaves tr((X - C) H_yy (X - C)^T) more:
    # the problem of plain LoRA, for X and H_yy.
    before = (left * pull).sum().item()
    for _ in range(_ROUNDS if start else 1):
        for number, part in enumerate(parts):
            if start:
                add(part, found[number], +1)
            here = part.rows, part.columns
            target = left[here] if part.divide is None else part.divide(pull[here])
            found[number : number + 1] = [solver.minimise(Objective(target.float(), part.metric), part.rank).factors]
            add(part, found[number], -1)
        after = (left * pull).sum().item()
        if before - after <= _LEAST_GAIN * after:
            break
        before = after
    return found
