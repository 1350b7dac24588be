"""One layer from end to end: quantize, build the metric, solve, and say how good the result is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .errors import CalibrationError
from .metrics import METRICS, Identity, MetricName
from .objective import Objective
from .quantizers import QuantizedWeight, Quantizer
from .solvers import LowRank, Solver
from .solvers.base import check_rank
from .statistics import InputStatistics


@final
@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer between quantization and correction; any number of solvers and ranks share what it holds.

    Attributes:
        quantized: `Q`.
        objective: `E = W - Q` and the metric that errors are reported in, with all that solvers have found so far.
        weight_energy: `tr(W H W^T)`, the energy of the full-precision output.
        statistics: second moment of the layer's inputs, if there was calibration.
    """

    quantized: QuantizedWeight
    objective: Objective
    weight_energy: float
    statistics: InputStatistics | None


@final
@dataclass(frozen=True, eq=False)
class LayerInitialization:
    """The quantized weight of one layer, its low-rank correction, and four errors to judge it by.

    All errors are `tr((E - C) H (E - C)^T)` with `E = W - Q`: squared, total over the layer's outputs, per token, in
    the metric of the statistics (the squared Frobenius norm if there were none).

    Attributes:
        quantized: `Q`.
        low_rank: `C = lora_B @ lora_A`, before PEFT's scaling is folded in.
        weight_energy: `tr(W H W^T)`, the energy of the full-precision output.
        error_none: error of the quantized weight alone.
        error_uncalibrated: error with the best correction that ignores the inputs (SVD).
        error: error with this correction.
        error_optimal: the least error that any correction of this rank can have; in wide layers, where the optimum is
            found by iteration, a bound that is at most a thousandth below it.
    """

    quantized: QuantizedWeight
    low_rank: LowRank
    weight_energy: float
    error_none: float
    error_uncalibrated: float
    error: float
    error_optimal: float

    @property
    def relative_error(self) -> float:
        """`error / tr(W H W^T)`."""
        return self.error / self.weight_energy if self.weight_energy > 0 else 0.0


@final
@dataclass(frozen=True)
class Initializer:
    """Composes a quantizer, a metric and a solver into the initialization of one layer.

    Plain tensors in and out; no model is needed:

    >>> import torch
    >>> from quailora import Initializer, InputStatistics, Optimal, Uniform
    >>> inputs, weight = torch.randn(1000, 48), torch.randn(32, 48)
    >>> statistics = InputStatistics.from_inputs(inputs)
    >>> layer = Initializer(Uniform(bits=3), Optimal(), rank=8)(weight, statistics)
    >>> layer.error <= layer.error_uncalibrated <= layer.error_none
    True
    >>> layer.low_rank.lora_B.shape, layer.low_rank.lora_A.shape
    (torch.Size([32, 8]), torch.Size([8, 48]))

    Attributes:
        quantizer: makes `Q` from `W`.
        solver: makes `C` from `W - Q`.
        rank: rank of `C`.
        metric: what the solver minimises: "gram" (the layer's output error), "diagonal" or "identity". The errors of
            the result are always reported in the Gram metric.
    """

    quantizer: Quantizer
    solver: Solver
    rank: int = 16
    metric: MetricName = "gram"

    def __call__(self, weight: Tensor, statistics: InputStatistics | None = None) -> LayerInitialization:
        """Initialize one layer.

        Args:
            weight: `W`, shape (out_features, in_features), any float dtype, any device.
            statistics: second moment of the layer's inputs; may be left out if neither part is calibrated.

        Raises:
            ValueError: if the rank or a shape is out of range.
            CalibrationError: if a part is calibrated and there are no statistics.
            NumericalError: if the weight has NaN or infinite entries.
        """
        return self.correct(self.quantize(weight, statistics))

    @torch.no_grad()
    def quantize(self, weight: Tensor, statistics: InputStatistics | None = None) -> QuantizedLayer:
        """Quantize a layer, and prepare what every solver needs; see `__call__`."""
        check_rank(self.rank, weight.shape)
        if statistics is None and self.solver.calibrated and self.metric != "identity":
            raise CalibrationError(
                f"{self.solver!r} needs calibration: pass the InputStatistics of the layer's inputs."
            )
        if statistics is not None:
            statistics = statistics.to(weight.device)
        quantized = self.quantizer.quantize(weight, statistics)
        full = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        judge = Identity() if statistics is None else METRICS["gram"](statistics)
        objective = Objective(full - quantized.dequantize().to(full.dtype), judge)
        del full  # a copy, where the weight is of a half type
        return QuantizedLayer(quantized, objective, judge.energy(weight.detach()), statistics)

    @torch.no_grad()
    def correct(self, layer: QuantizedLayer) -> LayerInitialization:
        """Solve for the correction of a quantized layer.

        Raises:
            ValueError: if the rank is out of range.
        """
        objective = layer.objective
        check_rank(self.rank, objective.error.shape)
        if layer.statistics is None or self.metric == "gram":
            low_rank = self.solver.minimise(objective, self.rank)
            error, bound = low_rank.error, low_rank.bound
        else:
            other = Objective(objective.error, METRICS[self.metric](layer.statistics))
            low_rank = self.solver.minimise(other, self.rank)
            error, bound = objective.value(low_rank.lora_B, low_rank.lora_A), 0.0
        uncalibrated = objective.projection(objective.subspace(self.rank, Identity()))
        return LayerInitialization(
            quantized=layer.quantized,
            low_rank=low_rank,
            weight_energy=layer.weight_energy,
            error_none=objective.value_at_zero,
            error_uncalibrated=objective.value(*uncalibrated),
            error=error,
            error_optimal=bound or objective.bound(self.rank),
        )
