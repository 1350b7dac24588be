"""What calibration keeps of single samples: the mean of the inputs of each, and the input of its first token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

SAMPLES = 128
"""How many samples are kept, as in NNCF."""


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of the first 128 samples, in float32.

    A sample is a row of a batch. A batch whose tokens are in one dimension, and one with padding, is one sample.

    Attributes:
        means: mean of the inputs of each sample.
        firsts: input of the first token of each sample.
    """

    means: Float[Tensor, "samples in_features"]
    firsts: Float[Tensor, "samples in_features"]

    @classmethod
    def none(cls, in_features: int, device: torch.device | str) -> Samples:
        """Return no samples of inputs of a width."""
        return cls(*(torch.zeros(0, in_features, device=device) for _ in range(2)))

    def __len__(self) -> int:
        return len(self.means)

    def with_batch(self, inputs: Tensor, mask: Tensor | None) -> Samples:
        """Return these samples and those of a batch; see `InputStatistics.update` for the arguments."""
        room = SAMPLES - len(self)
        if not room or not inputs.numel():
            return self
        samples = inputs.flatten(0, -3) if inputs.ndim > 2 else inputs.reshape(1, -1, inputs.shape[-1])
        if mask is None:
            samples = samples[:room]
            return self.joined(Samples(samples.mean(1, dtype=torch.float32), samples[:, 0].float()))
        counted = mask.reshape(samples.shape[:2]).to(samples.device)
        seen = counted.any(1).nonzero()[:room, 0]
        samples, counted = samples[seen], counted[seen]
        totals = torch.where(counted[:, :, None], samples, 0).sum(1, dtype=torch.float32)
        firsts = samples[torch.arange(len(seen), device=samples.device), counted.int().argmax(1)]
        return self.joined(Samples(totals / counted.sum(1, keepdim=True), firsts.float()))

    def joined(self, other: Samples) -> Samples:
        """Return these samples and others, on the device of these."""
        pairs = ((self.means, other.means), (self.firsts, other.firsts))
        return Samples(*(torch.cat([own, more.to(own.device)])[:SAMPLES] for own, more in pairs))

    def gathered(self, gather: Callable[[Tensor], list[Tensor]]) -> Samples:
        """Return the samples of all processes.

        Args:
            gather: returns the tensors of all processes, of any shapes.
        """
        tensors = (self.means, self.firsts)
        return Samples(*(torch.cat(gather(tensor.cpu()))[:SAMPLES].to(tensor.device) for tensor in tensors))
