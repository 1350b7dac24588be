"""The errors that a layer would have with each choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.metrics import gram
from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..quantizers import Quantizer
from ..schedules.held_out import roundings
from ..schedules.layer import Validation, difference
from .choices import Choice


@final
@dataclass(frozen=True, eq=False)
class RoundingError:
    """What a quantizer leaves of a weight, and what adapters of all ranks take off that.

    Attributes:
        error: `T - Q`, for the target `T` of the layer.
        lora_B: the first columns of it are the adapter of a lower rank.
        lora_A: its first rows, likewise.
    """

    error: Float[Tensor, "out_features in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    lora_A: Float[Tensor, "rank in_features"]

    def left(self, rank: int) -> Float[Tensor, "out_features in_features"]:
        """Return what an adapter leaves of the error, in float32: `T - Q - B A`."""
        found: Tensor = self.error.float() - self.lora_B[:, :rank].float() @ self.lora_A[:rank].float()
        return found

    def products(
        self,
        gradient: Float[Tensor, "out_features in_features"],
        calls: Sequence[tuple[Float[Tensor, "tokens in_features"], Float[Tensor, "tokens out_features"]]],
    ) -> Float[Tensor, " ranks"]:
        """Return the inner product of a gradient with what is left of the error, for ranks from 0 to the highest.

        Args:
            gradient: the gradient of the weight, in float32.
            calls: what it is made from: inputs, and gradients of outputs.
        """
        # <G, T - Q - B A> = <G, T - Q> - sum_k b_k^T G a_k, of which each rank adds one term. With G = sum_t d_t x_t^T
        # this term is sum_t (b_k^T d_t) (a_k^T x_t), which takes less time for a few tokens.
        whole = torch.dot(self.error.float().flatten(), gradient.flatten())
        taken = whole.new_zeros(self.lora_B.shape[1])
        for inputs, outputs in calls:
            dtype = outputs.dtype  # that of the backward pass
            coordinates = inputs.to(dtype) @ self.lora_A.T.to(dtype)
            taken += ((outputs @ self.lora_B.to(dtype)).float() * coordinates.float()).sum(0)
        return whole - torch.cat([taken.new_zeros(1), taken.cumsum(0)])

    def squares(self) -> Float[Tensor, " ranks"]:
        """Return the squared norm of what is left of the error, a total over its entries, for ranks from 0 up."""
        # |E - B A|^2 = |E|^2 - 2 sum_k b_k^T E a_k + sum_kl (b_k^T b_l) (a_k^T a_l), with k and l up to the rank.
        error, lora_B, lora_A = self.error.float(), self.lora_B.float(), self.lora_A.float()
        taken = ((lora_B.T @ error) * lora_A).sum(1).cumsum(0)
        added = ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).cumsum(0).cumsum(1).diagonal()
        return error.square().sum() + torch.cat([added.new_zeros(1), added - 2 * taken])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return the tensors by name, to be kept; errors in bfloat16, which is as precise as they have to be."""
        # Eight bits of an error change its square by less than a hundredth, and its range is that of float32.
        parts = {"error": self.error, "lora_B": self.lora_B, "lora_A": self.lora_A}
        return {f"{name} {number}": tensor.bfloat16().contiguous() for name, tensor in parts.items()}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], number: int, device: torch.device) -> RoundingError:
        """Build what `tensors` has returned, on a device."""
        return cls(*(tensors[f"{name} {number}"].to(device) for name in ("error", "lora_B", "lora_A")))


def quantizers_of(choices: Iterable[Choice]) -> list[Quantizer]:
    """Return the quantizers of some choices, each of them once."""
    return list(dict.fromkeys(choice.quantizer for choice in choices if choice.quantizer is not None))


@torch.no_grad()
def rounding_errors(
    target: Float[Tensor, "out_features in_features"],
    statistics: InputStatistics,
    choices: Sequence[Choice],
    rounding: int = 0,
    weight: Float[Tensor, "out_features in_features"] | None = None,
) -> Iterator[RoundingError]:
    """Quantize a layer by each quantizer and find its adapters, the optimum for each rank.

    Args:
        target: what base and adapter come close to, in the dtype of the weight.
        statistics: statistics of the inputs that bases and corrections are fitted to.
        choices: the choices, whose quantizers are gone through in their order.
        rounding: which of the `roundings` of each quantizer; the first one is the quantizer itself.
        weight: what is rounded, in place of the target.
    """
    rounded = target if weight is None else weight
    for quantizer in quantizers_of(choices):
        chosen = roundings(quantizer)[rounding] if rounding else quantizer
        error = difference(target, chosen.quantize(rounded, statistics))
        # One search finds the directions for all ranks: those of a lower rank come first.
        largest = min(max(choice.rank for choice in choices if choice.quantizer == quantizer), *target.shape)
        if not largest:
            yield RoundingError(error, error.new_zeros(len(error), 0), error.new_zeros(0, error.shape[1]))
            continue
        objective = Objective(error, gram(statistics))
        factors = objective.projection(objective.subspace(largest))
        yield RoundingError(error, factors.lora_B, factors.lora_A)


@torch.no_grad()
def best_rounding(quantizer: Quantizer, validation: Validation) -> int:
    """Return which of the `roundings` of a quantizer has the least error on held-out tokens, without an adapter."""
    layer = validation.layer

    def error(rounding: Quantizer) -> float:
        quantized = rounding.quantize(layer.weight.to(layer.dtype), layer.statistics)
        return validation.validation_error(quantized.dequantize())

    errors = [error(rounding) for rounding in roundings(quantizer)]
    return errors.index(min(errors))
