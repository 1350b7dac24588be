"""Weightings: how much each error of a layer counts. Some ignore the inputs, others use their moments or gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..errors import CalibrationError
from .metrics import SHRINKAGE, Diagonal, Gram, Identity, Metric, check_shrinkage, gram, shrunk
from .objective import Objective
from .samples import Samples
from .statistics import InputStatistics

_FLOOR = 1e-6  # least weight of a row as a share of the mean: every row is divided by the root of its weight


@final
@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Means of the empirical Fisher information `F = E[(dL/dW)^2]` of one layer.

    `L` is the loss of the whole model on one calibration window, and `E` the mean over these windows.

    Attributes:
        rows: mean over inputs, for each output.
        columns: mean over outputs, for each input.
    """

    rows: Float[Tensor, " out_features"]
    columns: Float[Tensor, " in_features"]


class Weighting(ABC):
    """Chooses the metric in which a method minimises the error of a layer, from what calibration knows of the layer.

    To add one, implement `metric`. Whatever a method minimises, its errors are reported in the Gram metric.

    Subclasses are final: none derives from another. Their hyper-parameters are the fields of a frozen dataclass.
    """

    name: ClassVar[str] = ""
    """Short name of a class of quailora, in files and on the command line; other classes go by their import path."""
    needs_calibration: ClassVar[bool] = True
    """Whether `metric` looks at the statistics of the layer's inputs."""
    needs_gradients: ClassVar[bool] = False
    """Whether `objective` needs the `Sensitivity` of the layer, which takes gradients of the whole model."""
    keeps_correlations: ClassVar[bool] = False
    """Whether the metric keeps correlations between input channels. Asymmetric inputs need them."""

    @abstractmethod
    def metric(self, statistics: InputStatistics) -> Metric:
        """Return the metric for a layer with these inputs."""

    def objective(
        self, gram_objective: Objective, statistics: InputStatistics | None, sensitivity: Sensitivity | None
    ) -> Objective:
        """Return the problem that solvers get.

        Args:
            gram_objective: the same error in the Gram metric. If the weighting has this metric, the same object is
                returned, so that methods share what they find.
            statistics: statistics of the layer's inputs; without them every input counts the same.
            sensitivity: sensitivity of the layer, for weightings that need gradients.

        Raises:
            CalibrationError: if the weighting needs gradients and there is no sensitivity.
        """
        # The same object where nothing changes: solvers keep what they have found with the objective, so that a method
        # in the Gram metric and the report, which is always in that metric, share one search.
        del sensitivity
        if statistics is None:
            return gram_objective
        metric = self.metric(statistics)
        return gram_objective if metric is gram_objective.metric else replace(gram_objective, metric=metric)


@final
@dataclass(frozen=True)
class IdentityWeighting(Weighting):
    """Every error of a weight counts the same: the squared Frobenius norm, which ignores the inputs."""

    name: ClassVar[str] = "identity"

    needs_calibration: ClassVar[bool] = False

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        del statistics
        return Identity()


@final
@dataclass(frozen=True)
class MagnitudeWeighting(Weighting):
    """Input channels count by the square of their mean magnitude (LQER)."""

    name: ClassVar[str] = "magnitude"

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        return Diagonal(statistics.mean_magnitude.square())


@final
@dataclass(frozen=True)
class DiagonalWeighting(Weighting):
    """Input channels count by their mean power, and correlations between them are ignored (QERA-approx)."""

    name: ClassVar[str] = "diagonal"

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        return Diagonal(statistics.second_moment.diagonal())


@final
@dataclass(frozen=True)
class GramWeighting(Weighting):
    """The error of the layer's output on the calibration data (QuAILoRA, eq. 1)."""

    name: ClassVar[str] = "gram"

    keeps_correlations: ClassVar[bool] = True

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        return gram(statistics)

    @override
    def objective(
        self, gram_objective: Objective, statistics: InputStatistics | None, sensitivity: Sensitivity | None
    ) -> Objective:
        # The metric is not built from the statistics again: a schedule that holds tokens out also solves for layers
        # that are fitted to a part of the tokens, and the objective already has the metric of that part.
        del statistics, sensitivity
        return gram_objective


@final
@dataclass(frozen=True)
class ShrunkWeighting(Weighting):
    """The output error with less weight on correlations between input channels, which generalises better.

    Attributes:
        share: share of the correlations that is taken off, from 0 to below 1.
    """

    name: ClassVar[str] = "shrunk"

    share: float = SHRINKAGE

    keeps_correlations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_shrinkage(self.share)

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        return shrunk(statistics, self.share)


@final
@dataclass(frozen=True)
class TokenMeansWeighting(Weighting):
    """Errors of weights, and errors of the output for the mean input of each sample, added up (NNCF).

    `H = I + sum_s m_s m_s^T` with the means `m_s` of `InputStatistics.samples`, at most 128, in their own units.
    """

    name: ClassVar[str] = "token-means"

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        def moment() -> Gram:
            means = samples_of(statistics, self.name).means.double()
            summed = means.T @ means
            summed.diagonal().add_(1)
            return Gram(summed)

        return statistics.cached(self.name, moment)


@final
@dataclass(frozen=True)
class FirstTokenWeighting(Weighting):
    """The output error, with more weight on the first token of each sample, to which all others attend.

    `H = (1 - share) E[x x^T] + share E[f f^T]` with the inputs `f` of the first tokens of `InputStatistics.samples`.

    Attributes:
        share: weight of first tokens, from 0 to below 1; they have one over the length of a sample without it.
    """

    name: ClassVar[str] = "first-token"

    share: float = 0.05

    def __post_init__(self) -> None:
        check_shrinkage(self.share)

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        def moment() -> Gram:
            firsts = samples_of(statistics, self.name).firsts.double()
            return Gram(torch.lerp(statistics.second_moment, firsts.T @ firsts / len(firsts), self.share))

        return statistics.cached((self.name, self.share), moment)

    @override
    def objective(
        self, gram_objective: Objective, statistics: InputStatistics | None, sensitivity: Sensitivity | None
    ) -> Objective:
        weighted, mean = super().objective(gram_objective, statistics, sensitivity), gram_objective.mean
        if statistics is None or mean is None:
            return weighted
        return replace(weighted, mean=torch.lerp(mean, statistics.samples.firsts.mean(0).to(mean), self.share))


@final
@dataclass(frozen=True)
class FisherWeighting(Weighting):
    """Outputs and inputs count by squared gradients of the loss (LQ-LoRA, Guo et al., 2023, arXiv 2311.12023).

    The error is `sum_ij F_ij (W - Q - C)_ij^2` with the Fisher information `F`. Up to a factor, `r_i c_j` takes the
    place of `F_ij`, with the means `r` over each row and `c` over each column of `F`. The error then has a closed-form
    minimum over `C` of a given rank (section 3.3). The whole model has to fit into memory, for its gradients.
    """

    name: ClassVar[str] = "fisher"

    needs_gradients: ClassVar[bool] = True

    @override
    def metric(self, statistics: InputStatistics) -> Metric:
        raise CalibrationError("This weighting depends on gradients, not on inputs: ask for `objective`.")

    @override
    def objective(
        self, gram_objective: Objective, statistics: InputStatistics | None, sensitivity: Sensitivity | None
    ) -> Objective:
        del statistics
        if sensitivity is None:
            raise CalibrationError("FisherWeighting needs the Sensitivity of the layer; see find_sensitivities.")
        # sum_ij r_i (E - C)_ij^2 c_j = |diag(r)^(1/2) (E - C) diag(c)^(1/2)|^2: with rows scaled by the roots of r this
        # is a diagonal metric c. The solver works on the scaled error, and rows of lora_B are divided by the scale at
        # the end.
        error = gram_objective.error
        rows = sensitivity.rows.to(error.device)
        scale = rows.clamp(min=_FLOOR * rows.mean().item()).sqrt()[:, None].float()
        if not scale.any():  # nothing depends on this layer
            scale = torch.ones_like(scale)
        return Objective(scale * error, Diagonal(sensitivity.columns.to(error.device)), scale)


def samples_of(statistics: InputStatistics, metric: str) -> Samples:
    """Return the samples of statistics.

    Raises:
        CalibrationError: if there are none.
    """
    if not len(statistics.samples):
        raise CalibrationError(
            f"The metric {metric} needs single samples, and these statistics have none: they are of an earlier "
            "version, or were made from sums. Collect them again with InputStatistics.update."
        )
    return statistics.samples


WEIGHTINGS: dict[str, type[Weighting]] = {
    cls.name: cls
    for cls in (
        GramWeighting,
        ShrunkWeighting,
        DiagonalWeighting,
        MagnitudeWeighting,
        IdentityWeighting,
        TokenMeansWeighting,
        FirstTokenWeighting,
        FisherWeighting,
    )
}
"""The weightings of quailora by their short names, as values of `--metric`, in the order that `quailora list` has."""
