"""The errors that a layer would have with each choice, on tokens that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.metrics import gram
from ..core.objective import Objective
from ..core.statistics import InputStatistics
from ..quantizers import QuantizedWeight, Quantizer
from ..schedules.layer import difference
from .choices import Choice

_DAMPING = 0.1
"""Damping of the error feedback: the one that held-out tokens choose most often on SmolLM2."""


@final
@dataclass(frozen=True, eq=False)
class LayerErrors:
    """What becomes of a layer with each choice.

    Attributes:
        errors: `tr((W - Q - C) H (W - Q - C)^T)` of each choice, squared, total over outputs, mean over held-out
            tokens; infinite for a rank that the layer cannot carry.
        weights: `Q + C` of the choices that were asked for, in the dtype of the weight.
    """

    errors: Float[Tensor, " choices"]
    weights: tuple[Float[Tensor, "out_features in_features"], ...]


@torch.no_grad()
def layer_errors(
    weight: Float[Tensor, "out_features in_features"],
    seen: InputStatistics,
    held_out: InputStatistics,
    choices: Sequence[Choice],
    wanted: Sequence[Choice],
) -> LayerErrors:
    """Quantize a layer and correct it by each choice, and measure the errors.

    Each quantizer rounds with error feedback, where its format has one, and the correction is the optimum for its rank.

    Args:
        weight: the full-precision weight `W`.
        seen: statistics of the inputs that bases and corrections are fitted to.
        held_out: statistics of the inputs that errors are measured on.
        choices: the choices.
        wanted: those among them whose weights are returned.
    """
    errors = torch.full((len(choices),), torch.inf, dtype=torch.float64)
    weights: dict[Choice, Tensor] = {}
    highest = min(weight.shape)
    for quantizer in dict.fromkeys(choice.quantizer for choice in choices):
        ranks = [choice.rank for choice in choices if choice.quantizer == quantizer and choice.rank <= highest]
        if quantizer is None:
            errors[choices.index(Choice(None))] = 0.0
            weights[Choice(None)] = weight
            continue
        # Bases and corrections are fitted to some tokens and measured on others. On their own tokens high ranks would
        # look better than they are, since they follow the noise of these as well.
        error = difference(weight, rounded(quantizer, weight, seen))
        fitted, measured = Objective(error, gram(seen)), Objective(error, gram(held_out))
        # One search finds the directions for all ranks: those of a lower rank come first.
        largest = max(ranks, default=0)
        factors = fitted.projection(fitted.subspace(largest)) if largest else None
        for rank in ranks:
            choice = Choice(quantizer, rank)
            lora_B, lora_A = (None, None) if factors is None else (factors.lora_B[:, :rank], factors.lora_A[:rank])
            without = lora_B is None or lora_A is None or not rank
            errors[choices.index(choice)] = (
                measured.value_at_zero if without else measured.value(lora_B, lora_A)  # type: ignore[arg-type] # as above
            )
            if choice in wanted:
                left = error if without else error - lora_B @ lora_A  # type: ignore[operator]
                weights[choice] = (weight.to(error.dtype) - left).to(weight.dtype)
    return LayerErrors(errors, tuple(weights[choice] for choice in wanted))


def rounded(quantizer: Quantizer, weight: Tensor, statistics: InputStatistics) -> QuantizedWeight:
    """Return the weight rounded by error feedback in the format of a quantizer, or as the quantizer itself does it."""
    nearest = quantizer.with_least_error() or quantizer
    return (nearest.with_feedback(_DAMPING) or quantizer).quantize(weight, statistics)
