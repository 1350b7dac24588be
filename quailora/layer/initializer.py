"""One layer from end to end: quantize, solve, and say how good the result is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..core.weightings import GramWeighting, Sensitivity, Weighting
from ..errors import CalibrationError, ConfigurationError
from ..families import Correction, Family, Fit
from ..families.lora import Lora
from ..quantizers import QuantizedWeight, Quantizer
from ..schedules import Once, Schedule
from ..schedules.layer import QuantizedLayer
from ..solvers import LowRank, Solver, Zero
from ..solvers.base import check_rank


@final
@dataclass(frozen=True, eq=False)
class LayerInitialization:
    """The quantized weight of one layer, its correction, and four errors to judge it by.

    All errors are `tr((E - C) H (E - C)^T)` with `E = W - Q`: squared, total over the layer's outputs, per token, in
    the metric of the statistics (the squared Frobenius norm if there were none).

    Attributes:
        quantized: the quantized weight `Q`.
        fit: the correction `C`, before PEFT's scaling is folded in.
        weight_energy: `tr(W H W^T)`, the energy of the full-precision output.
        error_none: error of the quantized weight alone.
        error_uncalibrated: error with the best correction of the same family that ignores the inputs; for LoRA that is
            the SVD.
        error: error with this correction, and its bias where it has one.
        error_optimal: the least error that any correction of this rank can have; in wide layers, where the optimum is
            found by iteration, a bound just below it; see `Subspace.upper` for when that holds. For families other than
            LoRA the error itself.
    """

    quantized: QuantizedWeight
    fit: Fit
    weight_energy: float
    error_none: float
    error_uncalibrated: float
    error: float
    error_optimal: float

    @property
    def correction(self) -> Correction:
        """The adapter of the layer, before PEFT's scaling is folded in."""
        return self.fit.correction

    @property
    def low_rank(self) -> LowRank:
        """`C = lora_B @ lora_A`, before PEFT's scaling is folded in.

        Raises:
            ConfigurationError: if the adapter is of another family than LoRA.
        """
        if self.fit.low_rank is None:
            raise ConfigurationError(
                f"Expected a correction by LoRA, got {self.correction.family!r}. See `correction`."
            )
        return self.fit.low_rank

    @property
    def relative_error(self) -> float:
        """`error / tr(W H W^T)`."""
        return self.error / self.weight_energy if self.weight_energy > 0 else 0.0


@final
@dataclass(frozen=True)
class Initializer:
    """Composes a quantizer, a metric, a solver, a family and a schedule into the initialization of one layer.

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
        quantizer: makes `Q` from `W`; None for bases that are quantized already, whose `Q` is then an argument.
        solver: makes `C` from `W - Q`.
        rank: rank of `C`, or what a family has in its place.
        weighting: which errors count how much for the solver, see `WEIGHTINGS`. The errors of the result are always
            reported in the Gram metric.
        schedule: how quantization and correction follow each other.
        family: the kind of adapter; None for LoRA. The solver finds its low-rank part, if it has one. With the solver
            `Zero` the adapter changes nothing.
    """

    quantizer: Quantizer | None
    solver: Solver
    rank: int = 16
    weighting: Weighting = GramWeighting()  # noqa: RUF009 # frozen
    schedule: Schedule = Once()  # noqa: RUF009 # frozen
    family: Family | None = None

    @property
    def adapter(self) -> Family:
        """The family, with the solver of this initializer where a solver finds a part of it."""
        return (self.family or Lora()).with_solver(self.solver)

    def __call__(
        self,
        weight: Tensor,
        statistics: InputStatistics | None = None,
        sensitivity: Sensitivity | None = None,
        quantized: QuantizedWeight | None = None,
    ) -> LayerInitialization:
        """Initialize one layer.

        Args:
            weight: `W`, shape (out_features, in_features), any float dtype, any device.
            statistics: second moment of the layer's inputs; may be left out if neither part needs calibration.
            sensitivity: sensitivity of the layer, for weightings that need gradients.
            quantized: `Q`, if it is there already.

        Raises:
            ValueError: if the rank or a shape is out of range.
            ConfigurationError: if there is neither a quantizer nor `Q`, or both.
            CalibrationError: if a part needs calibration and there are no statistics, or no sensitivity.
            NumericalError: if the weight has NaN or infinite entries.
        """
        return self.correct(self.quantize(weight, statistics, sensitivity, quantized))

    @torch.no_grad()
    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None = None,
        sensitivity: Sensitivity | None = None,
        quantized: QuantizedWeight | None = None,
    ) -> QuantizedLayer:
        """Quantize a layer, and prepare what every solver needs; see `__call__`."""
        self.check_size(weight)
        if statistics is None and self.solver.needs_calibration and self.weighting.needs_calibration:
            raise CalibrationError(
                f"{self.solver!r} needs calibration: pass the InputStatistics of the layer's inputs."
            )
        return QuantizedLayer.of(self.base(quantized), weight, statistics, sensitivity=sensitivity)

    def check_size(self, weight: Tensor) -> None:
        """Raise a `ValueError` or a `TargetError` unless a weight can carry an adapter of this rank."""
        if self.family is None or weight.ndim != 2:
            check_rank(self.rank, weight.shape)
        self.adapter.shapes((weight.shape[0], weight.shape[1]), self.rank)

    def base(self, quantized: QuantizedWeight | None = None) -> Quantizer | QuantizedWeight:
        """Return what gives `Q`: the quantizer, or what is there already.

        Raises:
            ConfigurationError: if there is neither, or both.
        """
        if (self.quantizer is None) == (quantized is None):
            raise ConfigurationError(
                "Expected a quantizer, or a weight that is quantized already, got "
                f"{'neither' if quantized is None else 'both'}."
            )
        return self.quantizer or quantized  # type: ignore[return-value] # one of them is there

    @torch.no_grad()
    def base_alone(self, layer: QuantizedLayer) -> QuantizedWeight:
        """Let the schedule choose the quantized weight of a layer that gets no correction.

        Raises:
            ConfigurationError: if the schedule cannot work with the quantizer, or without calibration.
        """
        schedule = self.schedule.alone() or Once()
        nothing = Lora().with_solver(Zero())
        return schedule.choose(layer, lambda objective: nothing.fit(objective, 1), 1).quantized

    @torch.no_grad()
    def correct(self, layer: QuantizedLayer) -> LayerInitialization:
        """Let the schedule choose the quantized weight, and solve for its correction.

        Raises:
            ValueError: if the rank is out of range.
            TargetError: if the layer cannot carry an adapter of the family.
            ConfigurationError: if the schedule cannot work with the quantizer, or without calibration.
            CalibrationError: if the weighting needs gradients and there is no sensitivity.
        """
        self.check_size(layer.objective.error)
        family = self.adapter
        fitted = layer.validation.layer if layer.validation is not None else layer

        def weighed(objective: Objective) -> Objective:
            # Where tokens are held out, schedules also solve for the layer that is fitted to the others.
            inputs = fitted if objective.metric is fitted.objective.metric else layer
            return self.weighting.objective(objective, inputs.statistics, inputs.sensitivity)

        def solve(objective: Objective) -> Fit:
            return fitted_by(family, self.solver, weighed(objective), self.rank)

        layer = self.schedule.choose(layer, solve, self.rank)
        objective, fit = layer.objective, solve(layer.objective)
        same_metric = weighed(objective) is objective
        error = fit.error if same_metric else error_of(family, objective, fit)
        # All four errors are in the Gram metric, whatever the method minimises, so that methods can be compared. The
        # certified bound is that of the solution where both metrics are the same, and is found for the optimum
        # otherwise.
        bound = (fit.bound if same_metric else 0.0) or objective.bound(self.rank) if fit.low_rank is not None else error
        uncalibrated = fit.error_uncalibrated if same_metric else None
        if uncalibrated is None:
            uncalibrated = family.uncalibrated(objective, self.rank).error
        return LayerInitialization(
            quantized=layer.quantized,
            fit=fit,
            weight_energy=layer.weight_energy,
            error_none=objective.value_at_zero,
            error_uncalibrated=uncalibrated,
            error=error,
            error_optimal=bound,
        )


def fitted_by(family: Family, solver: Solver, objective: Objective, rank: int) -> Fit:
    """Return the fit of a family; with the solver `Zero` the start that stock PEFT has, which changes nothing."""
    if isinstance(solver, Zero) and family.name != "lora":
        shape = objective.error.shape
        base = objective.base() if objective.base is not None and family.needs_base else None
        start = family.identity((shape[0], shape[1]), rank, base)
        if start is None:
            raise ConfigurationError(f"{family!r} has no start that changes nothing. Take another recipe or solver.")
        return family.finished(objective, start)
    return family.fit(objective, rank)


def error_of(family: Family, objective: Objective, fit: Fit) -> float:
    """Return the error of a fit in another metric than the one that it minimises."""
    if fit.low_rank is not None:
        return objective.value(*fit.low_rank.factors)
    return family.error(objective, fit.correction)
