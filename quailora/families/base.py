"""The interface of all families of adapters, and what a fit returns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from ..core.metrics import Identity
from ..core.objective import Deferred, Objective
from ..errors import CalibrationError, ConfigurationError
from ..solvers import LowRank, Solver
from .adapter import Correction, Parameters, PeftAdapter


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """What a family has found for one layer.

    Attributes:
        correction: the adapter.
        measured: its error, in the metric that was given; computed when it is first read.
        iterations: rounds that were run; 0 for direct solutions.
        low_rank: what the solver has returned, for plain LoRA.
        error_uncalibrated: error of the fit that ignores the inputs, in the metric that was given; None where `fit` has
            not needed it.
    """

    correction: Correction
    measured: Deferred
    iterations: int = 0
    low_rank: LowRank | None = field(default=None, repr=False)
    error_uncalibrated: float | None = None

    @property
    def error(self) -> float:
        """Error of exactly these parameters, in the metric that was given; see `Family.error`."""
        return self.measured.value

    @property
    def bound(self) -> float:
        """No adapter of this family and size has a smaller error than this; 0 where that is not known."""
        return 0.0 if self.low_rank is None else self.low_rank.bound

    def dense(self) -> Float[Tensor, "out_features in_features"]:
        """Return the correction `C` of a family that does not multiply the base."""
        return self.correction.dense()


class Family(PeftAdapter):
    """A kind of adapter: how its parameters change the output of a layer, and how to choose them.

    To add one, implement `shapes`, `solve`, `change` and `config`, and run `quailora.testing.check_family` on it.

    Laws, for every error, metric and size:

    - The result is never worse than an adapter that changes nothing, nor than the same family fitted without a look at
      the inputs, in the metric that was given.
    - The error that is reported is that of exactly the tensors that are stored.
    - Stock PEFT loads the files, and its layer computes `(Q + C) x + b`.
    - A backward pass gives every tensor that is trained a gradient other than zero.

    A family is either this class or final. Its hyper-parameters are the fields of a frozen dataclass.
    """

    @abstractmethod
    def solve(self, objective: Objective, rank: int) -> Parameters:
        """Return parameters that make the error of the layer small, in float32 or float64.

        Args:
            objective: `E = W - Q` and the metric; `base` and `mean` are there for families that need them, but `mean`
                is None where the metric is the identity.
            rank: size of the adapter.
        """

    def with_solver(self, solver: Solver) -> Family:
        """Return the family with another solver, if it has a low-rank part that a solver finds; else itself."""
        del solver
        return self

    def resized(self, shapes: Sequence[tuple[int, int]], numbers: int) -> Family:
        """Return the family with fields that make it about as large as asked for; itself where it has one size only.

        Args:
            shapes: `(out_features, in_features)` of each layer.
            numbers: how many numbers all layers together shall have at most.
        """
        del shapes, numbers
        return self

    def fit(self, objective: Objective, rank: int) -> Fit:
        """Return the parameters for a layer: the best of `solve`, of a fit without inputs, and of no change.

        Args:
            objective: the error and the metric, with `base` and `mean` for families that need them.
            rank: size of the adapter.

        Raises:
            TargetError: if the layer cannot carry an adapter of this size.
            CalibrationError: if the family needs the mean of the inputs, and it is not known.
            ConfigurationError: if outputs have different weights.
        """
        self.check(objective, rank)
        best = uncalibrated = self.uncalibrated(objective, rank)
        if not isinstance(objective.metric, Identity):
            best = min(self.finished(objective, self.solve(objective, rank)), uncalibrated, key=lambda one: one.error)
        return replace(best, error_uncalibrated=uncalibrated.error)

    def uncalibrated(self, objective: Objective, rank: int) -> Fit:
        """Return the better of a fit that ignores the inputs and of no change, measured in the metric that is given."""
        blind = replace(objective, metric=Identity(), mean=None)
        shape, base = tuple(objective.error.shape), objective.base() if objective.base and self.needs_base else None
        candidates = [self.solve(blind, rank), self.identity((shape[0], shape[1]), rank, base)]
        fits = [self.finished(objective, parameters) for parameters in candidates if parameters is not None]
        return min(fits, key=lambda one: one.error)

    @final
    def finished(self, objective: Objective, parameters: Parameters) -> Fit:
        """Return parameters as they are stored, with the error of exactly these."""
        kept = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in parameters.items()
        }
        shape = objective.error.shape
        correction = Correction(
            self, {name: tensor.to(objective.error.device) for name, tensor in kept.items()}, (shape[0], shape[1])
        )
        return Fit(correction, Deferred(lambda: self.error(objective, correction)))

    @final
    def error(self, objective: Objective, correction: Correction) -> float:
        """Return the error that is left, see `Objective.value_of`, of exactly the tensors that are stored."""
        base = objective.base() if objective.base is not None and self.needs_base else objective.error
        doubled = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in correction.parameters.items()
        }
        return objective.value_of(*self.change(doubled, base))

    @final
    def check(self, objective: Objective, rank: int) -> None:
        """Raise the errors of `fit`."""
        shape = objective.error.shape
        self.shapes((shape[0], shape[1]), rank)
        if objective.row_scale is not None:
            raise ConfigurationError(
                f"{self!r} takes no weighting of outputs, got one. Take the metric gram or shrunk, or the family lora."
            )
        if self.needs_mean and objective.mean is None and not isinstance(objective.metric, Identity):
            raise CalibrationError(
                f"{self!r} needs the mean of the inputs, and these statistics have none. Collect them again with "
                "InputStatistics.update."
            )
        if self.needs_base and objective.base is None:
            raise ConfigurationError(f"{self!r} multiplies the quantized weight, which has to be in the objective.")
