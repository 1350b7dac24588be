"""Error feedback that leaves out what the correction repairs: ProjQ (2026, arXiv 2606.00494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from typing_extensions import override

from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..errors import ConfigurationError
from ..families import Fit
from .base import Schedule, Solve, best_iterate, check_rounds
from .layer import QuantizedLayer


@final
@dataclass(frozen=True)
class ProjQ(Schedule):
    """Round with error feedback in a metric that leaves out what the correction repairs (ProjQ).

    Let `U` be the output directions of the correction so far. The correction can remove all that a new error has along
    the input directions `H E^T U`, so the feedback works on `H` without these directions.

    Attributes:
        rounds: how often the weight is quantized again, at most.
    """

    name: ClassVar[str] = "projq"

    rounds: int = 5

    def __post_init__(self) -> None:
        check_rounds(self.rounds)

    @property
    @override
    def solutions(self) -> int:
        return self.rounds + 2

    @override
    def choose(self, layer: QuantizedLayer, solve: Solve, rank: int) -> QuantizedLayer:
        if layer.statistics is None or layer.quantizer is None or not layer.quantizer.needs_calibration:
            raise ConfigurationError(
                "ProjQ needs calibration and a quantizer with error feedback: pass the InputStatistics of the layer's "
                "inputs, and take GPTQ or NF4GPTQ."
            )

        def projected(layer: QuantizedLayer, correction: Fit) -> QuantizedLayer:
            del correction
            assert layer.statistics is not None
            return layer.requantized(layer.weight, deflated(layer.statistics, layer.objective, rank))

        return best_iterate(layer, solve, self.rounds, projected)


def deflated(statistics: InputStatistics, objective: Objective, rank: int) -> InputStatistics:
    """Return statistics without the input directions in which the best correction removes all error.

    `H' = H - K S^-1 K^T` with `K = H E^T U` and `S = U^T E H E^T U`, which is diagonal for the leading eigenvectors
    `U`; with any root `H = L L^T` this is `L (I - V V^T) L^T`, `V` being the right singular vectors of `E L`.
    """
    # Let H = L L^T, and let E L = U S^(1/2) V^T be cut to the leading directions. For the next error E' the correction
    # C = E' L V V^T L^-1 has the same rank and removes everything that E' L has along V. What it leaves is
    #
    #     tr(E' L (I - V V^T) L^T E'^T) = tr(E' H' E'^T),    H' = H - (L V) (L V)^T.
    #
    # So feedback in the metric H' does not spend anything on what the correction can take over. No root is needed:
    # V = L^T E^T U S^(-1/2) gives L V = H E^T U S^(-1/2) = K S^(-1/2), and S = U^T E H E^T U is computed as K^T E^T U.
    #
    # The ridge is added before the deflation because H was rounded, and after it because the remainder can be rounding
    # error only. It is as large as float32's rounding of the trace.
    moment = statistics.second_moment
    ridge = torch.finfo(torch.float32).eps * moment.trace() * torch.eye(len(moment), device=moment.device)
    moment = moment + ridge
    rows = objective.subspace(rank).basis.double().T @ objective.error.double()
    along = rows @ moment  # K^T
    # S is diagonal for exact eigenvectors; for those of an iteration it is only nearly so, and its eigenvectors make up
    # the difference. Directions without energy are left out, since S cannot be inverted there.
    values, vectors = torch.linalg.eigh(along @ rows.T)
    live = values > torch.finfo(torch.float32).eps * values.max()
    whitened = (vectors[:, live] / values[live].sqrt()).T @ along
    rest = moment - whitened.T @ whitened + ridge
    result = InputStatistics(statistics.in_features, rest.device)
    result.add((rest + rest.T) / 2 * statistics.tokens, statistics.tokens)
    return result
