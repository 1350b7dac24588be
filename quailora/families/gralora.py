"""GraLoRA: a correction of low-rank blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import uniform
from ..core.metrics import Identity
from ..core.objective import Factors, Objective
from ..errors import ConfigurationError, TargetError
from ..solvers import Optimal, Solver
from .adapter import Change, Parameters, check_rank_for
from .base import Family
from .linear import dense_metric
from .parts import Part, alternated, parts_of

_A, _B = "gralora_A", "gralora_B"
_WHOLE_A, _WHOLE_B = "gralora_A_general.weight", "gralora_B_general.weight"


@final
@dataclass(frozen=True)
class GraLora(Family):
    """`gralora_k^2` blocks, each of rank `r / gralora_k` (Jung et al., 2025, arXiv 2505.20355).

    To these PEFT can add a low-rank correction of the whole weight. All are found in turn, each one as the best given
    the others, until a round gains next to nothing. Blocks with different outputs do not depend on each other.

    Attributes:
        solver: finds each low-rank correction.
        gralora_k: how many groups the inputs and the outputs are cut into; has to divide their numbers and the rank.
        hybrid_r: rank of the correction of the whole weight; 0 for none.
    """

    name: ClassVar[str] = "gralora"
    peft_type: ClassVar[str] = "GRALORA"
    default_rank: ClassVar[int | None] = 32
    scales: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8", "torchao"})

    solver: Solver = Optimal()  # noqa: RUF009 # frozen
    gralora_k: int = 2
    hybrid_r: int = 0

    def __post_init__(self) -> None:
        if self.gralora_k < 1:
            raise ConfigurationError(f"Expected a gralora_k of at least 1, got {self.gralora_k}.")
        if self.hybrid_r < 0:
            raise ConfigurationError(f"Expected a hybrid_r of at least 0, got {self.hybrid_r}.")

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        k, whole, (rows, columns) = self.gralora_k, self.hybrid_r, shape
        check_rank_for(self, rank, min(shape), shape)
        check_rank_for(self, whole or rank, min(shape), shape)
        if rank % k or rows % k or columns % k:
            raise TargetError(
                f"Expected a rank and a layer whose sides gralora_k={k} divides, got rank {rank} and shape {shape}."
            )
        blocks = {_A: (k, columns // k, rank), _B: (k, rank, rows // k)}
        return blocks | ({_WHOLE_A: (whole, columns), _WHOLE_B: (rows, whole)} if whole else {})

    @override
    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters:
        # As in plain LoRA one factor is random, so that the other one has a gradient.
        zeros = {name: torch.zeros(size) for name, size in self.shapes(shape, rank).items()}
        random = {name: uniform(tuple(zero.shape), zero, seed=0) / shape[1] ** 0.5 for name, zero in zeros.items()}
        return {name: random[name] if name in {_A, _WHOLE_A} else zero for name, zero in zeros.items()}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        k, error = self.gralora_k, objective.error.double()
        metric = objective.metric if self.solver.needs_calibration else Identity()
        dense = None if isinstance(metric, Identity) else dense_metric(metric, error)
        rows, columns = ([slice(at, at + side // k) for at in range(0, side, side // k)] for side in error.shape)
        parts = [part for inputs in columns for part in parts_of(dense, rows, inputs, rank // k)]
        start, left = [], error.float()
        if self.hybrid_r:
            parts.insert(0, Part(slice(None), slice(None), self.hybrid_r, metric))
            start.append(self.solver.minimise(Objective(left, metric), self.hybrid_r).factors)
            left = left - start[0].lora_B @ start[0].lora_A
        if dense is not None or self.hybrid_r:
            # Inputs have a mean, so that blocks share much of what they gain. Plain LoRA of all blocks of a row at
            # once, whose lora_B is the same for all of them, is nearer to the solution than no correction is.
            wide = [self.solver.minimise(Objective(left[outputs], metric), rank // k).factors for outputs in rows]
            start += [Factors(pair.lora_B, pair.lora_A[:, inputs]) for inputs in columns for pair in wide]
        found = alternated(error, dense, parts, self.solver, start)
        blocks, whole = found[-k * k :], found[: -k * k]
        # Blocks are in the order of their inputs. PEFT has for each group of inputs the lora_A of all outputs, side by
        # side, and for each group of outputs the lora_B of all inputs, one below the other.
        lora_A = torch.stack([torch.cat([pair.lora_A for pair in blocks[at * k : at * k + k]]).T for at in range(k)])
        lora_B = torch.stack([torch.cat([pair.lora_B.T for pair in blocks[at::k]]) for at in range(k)])
        general = {_WHOLE_A: whole[0].lora_A, _WHOLE_B: whole[0].lora_B} if whole else {}
        return {_A: lora_A, _B: lora_B} | general

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        lora_A, lora_B = self._split(parameters)
        weight = torch.einsum("yixs,xyso->xoyi", lora_A, lora_B).flatten(2).flatten(0, 1)
        return Change(weight + parameters[_WHOLE_B] @ parameters[_WHOLE_A] if self.hybrid_r else weight)

    @override
    def output(
        self, parameters: Parameters, inputs: Float[Tensor, "*batch in_features"], base: Tensor | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        lora_A, lora_B = self._split(parameters)
        inner = torch.einsum("...yi,yixs->...xys", inputs.reshape(*inputs.shape[:-1], self.gralora_k, -1), lora_A)
        added = torch.einsum("...xys,xyso->...xo", inner, lora_B).flatten(-2)
        return added + inputs @ parameters[_WHOLE_A].T @ parameters[_WHOLE_B].T if self.hybrid_r else added

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        own = {"gralora_k": self.gralora_k, "hybrid_r": self.hybrid_r, "init_weights": True}
        return {"r": sizes["r"], "alpha": sizes["lora_alpha"], **own}

    @override
    def with_solver(self, solver: Solver) -> GraLora:
        return replace(self, solver=solver)

    @override
    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        return alpha / (rank + self.hybrid_r)

    @override
    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        return {name: (tensor.double() / scale**0.5).float() for name, tensor in parameters.items()}

    def _split(self, parameters: Parameters) -> tuple[Float[Tensor, "k i k s"], Float[Tensor, "k k s o"]]:
        """Return `lora_A^T` by its inputs and outputs, and `lora_B^T` by its outputs and inputs, of all blocks."""
        lora_A, lora_B, k = parameters[_A], parameters[_B], self.gralora_k
        return lora_A.view(k, lora_A.shape[1], k, -1), lora_B.view(k, k, -1, lora_B.shape[2])
