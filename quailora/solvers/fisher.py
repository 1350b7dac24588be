"""How much the loss of the model depends on each output and each input of a layer: LQ-LoRA's row and column weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.metrics import Diagonal
from ..core.objective import Factors, Objective
from . import LowRank, Solver
from .base import finish

_FLOOR = 1e-6  # of the mean: a row that no gradient reached still has to be divided by its weight


@final
@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Means of the empirical Fisher information `F = E[(dL/dW)^2]`, over windows, of one layer.

    With them in place of `F` itself, `|sqrt(F) (W - Q - C)|^2` has a closed-form minimum over `C` of a given rank
    (LQ-LoRA, Guo et al., 2023, arXiv 2311.12023, section 3.3).

    Attributes:
        rows: mean over inputs, for each output.
        columns: mean over outputs, for each input.
    """

    rows: Float[Tensor, " out_features"]
    columns: Float[Tensor, " in_features"]

    def minimise(self, objective: Objective, solver: Solver, rank: int) -> LowRank:
        """Return the correction that leaves the least `sum_ij rows_i (E - C)_ij^2 columns_j`; this is its `error`.

        Args:
            objective: `E`, and the metric that energies of the result are in.
            solver: minimises over the inputs; the outputs are scaled for it.
            rank: of the correction.
        """
        device = objective.error.device
        scale = self.rows.to(device).clamp(min=_FLOOR * self.rows.mean().item()).sqrt()[:, None].float()
        if not scale.any():  # nothing depends on this layer
            scale = torch.ones_like(scale)
        weighted = Objective(scale * objective.error, Diagonal(self.columns.to(device)))
        found = solver.minimise(weighted, rank)
        unscaled = finish(objective, Factors(found.lora_B / scale, found.lora_A))
        return replace(unscaled, gain=found.gain, total=found.total)
