"""What a block of a quantized model is trained on: the inputs that it gets there, and the outputs to aim at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import CalibrationError
from ..support import distributed


@final
@dataclass(frozen=True, eq=False)
class BlockExamples:
    """Sequences that a block is run on, by number, and what it is to return for them.

    Attributes:
        index: number of the block in the model, from 0.
        name: its module name.
        trained: numbers of the examples to train on.
        held_out: numbers of those that tell whether training has helped.
        output: runs the block on the hidden states that it gets in the quantized model; differentiable in whatever its
            layers compute with.
        aim: returns what the block returns in the model that is aimed at.
        counted: the tokens of an example that count, (samples, length); all of them where it returns None.
        shared: whether every process has examples of its own, and all of them train the same block together.
    """

    index: int
    name: str
    trained: Sequence[int]
    held_out: Sequence[int]
    output: Callable[[int], Tensor]
    aim: Callable[[int], Tensor]
    counted: Callable[[int], Bool[Tensor, "samples length"] | None] = lambda _: None
    shared: bool = False

    def check(self) -> None:
        """Raise a `CalibrationError` if there is nothing to train on, for one of several processes."""
        found = distributed.gather(len(self.trained)) if self.shared else [len(self.trained)]
        if not all(found):
            raise CalibrationError(
                f"Expected samples to train on for each of {len(found)} processes, got {sum(found)} batches of them. "
                "Calibrate on more samples, or use fewer processes."
            )

    def loss(self, number: int) -> Float[Tensor, ""]:
        """Return the mean over tokens of the squared error of the outputs, relative to the aim's squared norm."""
        return self._errors(number).mean()

    @torch.no_grad()
    def mean_loss(self, numbers: Sequence[int]) -> float:
        """Return the mean over the tokens of several examples; see `loss`."""
        total, tokens = 0.0, 0
        for number in numbers:
            errors = self._errors(number)
            total, tokens = total + errors.sum(dtype=torch.float64).item(), tokens + errors.numel()
        if self.shared:
            parts = distributed.gather((total, tokens))
            total, tokens = sum(part for part, _ in parts), sum(part for _, part in parts)
        return total / max(1, tokens)

    def average(self, gradients: Sequence[Tensor | None]) -> None:
        """Replace gradients by their mean over all processes, where these train together."""
        # A step then sees an example of each process, and all processes take the same step.
        if not self.shared:
            return
        for gradient in gradients:
            if gradient is not None:
                distributed.add_up(gradient).div_(distributed.world_size())

    def _errors(self, number: int) -> Float[Tensor, " tokens"]:
        # Some tokens have hidden states a thousand times as large as others, the first one above all, and what follows
        # divides each token's states by their size. Errors of all tokens count alike once they are relative to it.
        found = self.output(number).float()
        aim = self.aim(number).to(found.device).float()
        errors = (found - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=torch.finfo(aim.dtype).tiny)
        counted = self.counted(number)
        return errors.flatten() if counted is None else errors[counted.to(errors.device)]
