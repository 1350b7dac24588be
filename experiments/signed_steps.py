"""The training of a block by signed steps (Cheng et al., 2023, "AutoRound", arXiv 2309.05516), to compare ours with.

What is trained is how far each weight is moved before it is rounded, by half a level at most, and how far the ends of
each group are drawn in. Each step moves all of them by the same amount, in the direction that their gradient says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from quailora import Uniform
from quailora.calibration.examples import BlockExamples
from quailora.calibration.windows import random_order
from quailora.families import Correction
from quailora.methods.block_training import BlockTraining
from quailora.methods.distillation import trainable
from quailora.methods.trained_codes import computing_with
from quailora.models.layers import Layer


class Rounded(torch.autograd.Function):
    """Rounding whose gradient is that of no rounding at all: the straight-through estimator."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, *numbers: Tensor) -> Tensor:
        return numbers[0].round()

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0]


@final
class MovedWeight:
    """A weight that is rounded to nearest after it was moved a little; in the beginning it is not moved.

    Args:
        weight: the weight, (out_features, in_features), whose columns fill whole groups.
        quantizer: bits and group size.
    """

    def __init__(self, weight: Float[Tensor, "out_features in_features"], quantizer: Uniform) -> None:
        size = quantizer.group_size or weight.shape[1]
        self._groups = weight.float().reshape(len(weight), -1, size)
        self._top = 2**quantizer.bits - 1
        self._low, self._high = self._groups.amin(-1, True).clamp(max=0), self._groups.amax(-1, True).clamp(min=0)
        self.moves = torch.zeros_like(self._groups).requires_grad_()
        self.ends = torch.ones_like(torch.stack([self._low, self._high])).requires_grad_()

    def values(self) -> Float[Tensor, "out_features in_features"]:
        """Return the rounded weight, float32; differentiable."""
        low, high = self._low * self.ends[0], self._high * self.ends[1]
        scale = ((high - low) / self._top).clamp(min=torch.finfo(torch.float16).tiny)
        zero_point = Rounded.apply(-low / scale)
        codes = (Rounded.apply(self._groups / scale + self.moves) + zero_point).clamp(0, self._top)
        return ((codes - zero_point) * scale).flatten(1)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step against the signs of the gradients, and stay in the bounds of the method."""
        for tensor, low, high in ((self.moves, -0.5, 0.5), (self.ends, 0.0, 1.0)):
            assert tensor.grad is not None
            tensor.sub_(rate * tensor.grad.sign()).clamp_(low, high)
            tensor.grad = None


def signed_steps(
    examples: BlockExamples,
    layers: Mapping[str, Layer],
    aims: Mapping[str, Tensor],
    corrections: Mapping[str, Correction],
    quantizer: Uniform,
    training: BlockTraining,
) -> float:
    """Train a block by signed steps, and its adapters beside that by AdamW; return its loss on held-out tokens.

    Args:
        examples: inputs of the block, and outputs to aim at.
        layers: its layers.
        aims: what is rounded of each layer, which is its weight less its adapter.
        corrections: the adapters to start from.
        quantizer: bits and group size.
        training: number of steps, and the learning rate of adapters. Signed steps begin at one by the number of steps.
    """
    moved: Mapping[str, Any] = {name: MovedWeight(aim, quantizer) for name, aim in aims.items()}
    adapters = {name: trainable(one, layers[name].weight.device) for name, one in corrections.items()}
    numbers = [tensor for one in adapters.values() for tensor in one.parameters.values()]
    optimizer = torch.optim.AdamW(numbers, training.factor_rate, (0.9, 0.95), 1e-15, 0.0) if numbers else None
    order = random_order(len(examples.trained), training.steps, training.seed + examples.index)
    for step, number in enumerate(order.tolist()):
        with torch.enable_grad(), computing_with(layers, moved, adapters):
            torch.autograd.backward(examples.loss(examples.trained[number]))
        left = 1 - step / training.steps
        for one in moved.values():
            one.step(left / training.steps)
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = training.factor_rate * left
            optimizer.step()
            optimizer.zero_grad()
    with computing_with(layers, moved, adapters):
        return examples.mean_loss(examples.held_out)
