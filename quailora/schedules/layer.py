"""One quantized layer: what schedules and solvers work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..core.metrics import Identity, gram
from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..core.weightings import Sensitivity
from ..errors import ConfigurationError, NumericalError
from ..quantizers import QuantizedWeight, Quantizer
from ..quantizers.base import check_finite


@final
@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer between quantization and correction; any number of solvers and ranks share what it holds.

    Attributes:
        weight: what `Q + C` should come close to: `W`, or a target in its place.
        quantizer: what makes `Q`; None where `Q` was there before, and stays.
        quantized: the quantized weight `Q`.
        objective: `E = W - Q` and the metric that errors are reported in, with all that solvers have found so far.
        weight_energy: `tr(W H W^T)`, the energy of the full-precision output.
        statistics: second moment of the layer's inputs, if there was calibration.
        dtype: dtype of `W`, which is what gets quantized.
        sensitivity: weights of outputs and inputs, for weightings that need gradients.
        validation: the layer fitted to a part of the tokens, and its error on the others, where some are held out.
    """

    weight: Tensor
    quantizer: Quantizer | None
    quantized: QuantizedWeight
    objective: Objective
    weight_energy: float
    statistics: InputStatistics | None
    dtype: torch.dtype
    sensitivity: Sensitivity | None = None
    validation: Validation | None = None

    @classmethod
    def of(
        cls,
        base: Quantizer | QuantizedWeight,
        weight: Tensor,
        statistics: InputStatistics | None = None,
        target: Tensor | None = None,
        sensitivity: Sensitivity | None = None,
    ) -> QuantizedLayer:
        """Quantize a weight, or take what it has been quantized to before.

        Args:
            base: makes `Q` from the weight, or is `Q`.
            weight: the full-precision weight `W`.
            statistics: second moment of the inputs.
            target: what `Q + C` should come close to; the weight itself if it is missing.
            sensitivity: weights of outputs and inputs; see the class.

        Raises:
            ValueError, CalibrationError, NumericalError: as `Quantizer.quantize` does.
        """
        weight = weight.detach()
        if statistics is not None:
            statistics = statistics.to(weight.device)
        metric = Identity() if statistics is None else gram(statistics)
        quantizer = base if isinstance(base, Quantizer) else None
        quantized = base.quantize(weight, statistics) if isinstance(base, Quantizer) else base
        target = weight if target is None else target
        mean = None if statistics is None else statistics.mean
        objective = Objective(difference(target, quantized), metric, mean=mean, base=quantized.dequantize)
        energy = metric.energy(weight)
        return cls(target, quantizer, quantized, objective, energy, statistics, weight.dtype, sensitivity)

    def objective_of(self, matrix: Tensor) -> Objective:
        """Return the objective of another matrix in place of `W - Q`, in the same metric."""
        return Objective(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), self.objective.metric)

    def requantized(self, matrix: Tensor, statistics: InputStatistics | None = None) -> QuantizedLayer:
        """Return the layer with `Q` made from another matrix, such as `W - C`.

        Args:
            matrix: what to quantize.
            statistics: what the quantizer shall see in place of the layer's own.

        Raises:
            ConfigurationError: if the base was quantized before.
        """
        if self.quantizer is None:
            raise ConfigurationError("This base is quantized already, and the schedule would quantize it again.")
        quantized = self.quantizer.quantize(matrix.to(self.dtype), statistics or self.statistics)
        error = difference(self.weight, quantized)
        objective = replace(self.objective, error=error, base=quantized.dequantize)
        return replace(self, quantized=quantized, objective=objective)


@final
@dataclass(frozen=True, eq=False)
class Validation:
    """A layer that was fitted to a part of the tokens, with the error on the tokens that were held out.

    Attributes:
        layer: fitted to the tokens that are not held out.
        validation_error: maps a weight `Q + C` to the error of its outputs on the held-out tokens, up to a constant.
    """

    layer: QuantizedLayer
    validation_error: Callable[[Tensor], float]


def difference(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return `W - Q` in float32 at least.

    Raises:
        NumericalError: if it has an entry that is not finite.
    """
    full = weight.to(torch.promote_types(weight.dtype, torch.float32))
    error = full - quantized.dequantize().to(full.dtype)
    if not error.isfinite().all():
        check_finite(weight)
        raise NumericalError(
            f"Expected a finite quantized weight, got NaN or infinite entries in {type(quantized).__name__} of shape "
            f"{quantized.shape}. Values near the end of float16 are rounded beyond it: take the model in bfloat16."
        )
    return error
