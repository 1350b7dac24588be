"""The codes and scales of one quantized weight while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.blocks import forward_replaced
from ..families import Correction
from ..models.layers import Layer
from ..quantizers import QuantizedWeight

_EDGE = 0.48  # of a level: how far from its code a place may be in the beginning; at 0.5 it would be the next code's


@final
class TrainedCodes:
    """Codes that move between levels, and factors of the scales, of one quantized weight.

    Each number of the weight has a place among the levels: its code, and a part of the way to the next one. The number
    is the level that is nearest to its place. Gradients are passed from the number to its place as if nothing were
    rounded (the straight-through estimator). In the beginning a place is as far from its code as the aim is from the
    level, so that numbers whose aim lies between two levels change first.

    Args:
        stored: the quantized weight to begin with.
        aim: the weight that it comes close to, (out_features, in_features).
        codes: whether codes are trained, where the format has such that may change.
        scales: whether scales are trained, likewise.

    Attributes:
        places: place of each number, in levels; its gradient has the sign and the proportions that AdamW needs. Empty
            where codes are not trained.
        changes: what is added to the factor 1 of each scale; empty where scales are not trained.
    """

    def __init__(
        self,
        stored: QuantizedWeight,
        aim: Float[Tensor, "out_features in_features"],
        *,
        codes: bool = True,
        scales: bool = True,
    ) -> None:
        device = aim.device
        self._moves = codes and bool(stored.code_count)
        self.changes = torch.zeros(stored.scale_count if scales else 0, device=device, requires_grad=True)
        if not self._moves:
            self._stored = stored
            self.places = torch.zeros(0, device=device, requires_grad=True)
            self._levels = stored.dequantize().float().to(device)
            return
        self._stored, self._home = stored.on(device), next(iter(stored.tensors().values())).device
        own = self._stored.code_matrix().float()
        levels = self._decode(own)
        beside = aim.float() - levels
        # The gap to the next level on that side; there is none beyond the ends.
        gap = (self._decode((own + beside.sign()).clamp(0, stored.code_count - 1)) - levels).abs()
        parts = torch.where(gap > 0, beside.abs() / gap, 0.0).clamp(max=_EDGE)
        # Error feedback has put some codes levels away from their aim. Of the way there a part of one level counts.
        self.places = (own + beside.sign() * parts).requires_grad_()
        self._levels = levels.requires_grad_()

    def values(self) -> Float[Tensor, "out_features in_features"]:
        """Return the weight as it is now, float32; differentiable."""
        if not len(self.changes):
            return self._levels
        return self._levels * (1 + self._stored.spread(self.changes))

    def pass_gradient_on(self) -> None:
        """Give places the gradient of their numbers."""
        # The gradient of a place is that of its number times the gap between levels, which hardly changes. AdamW
        # divides each gradient by its own running size, so that a constant factor makes no difference.
        if self._moves:
            self.places.grad, self._levels.grad = self._levels.grad, None

    @torch.no_grad()
    def follow(self) -> None:
        """Let numbers be the levels that are nearest to their places."""
        if self._moves:
            self._levels.copy_(self._decode(self._codes()))

    @torch.no_grad()
    def weight(self) -> QuantizedWeight:
        """Return the quantized weight as it is now, on the device where it came from."""
        found = self._stored
        if self._moves:
            found = found.recoded(self._codes().to(torch.uint8)).on(self._home)
        return found.rescaled(1 + self.changes.detach()) if len(self.changes) else found

    def _codes(self) -> Float[Tensor, "out_features in_features"]:
        return self.places.detach().round().clamp(0, self._stored.code_count - 1)

    def _decode(self, codes: Shaped[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        return self._stored.decode(codes).float()


@contextmanager
def computing_with(
    layers: Mapping[str, Layer],
    codes: Mapping[str, TrainedCodes],
    corrections: Mapping[str, Correction] = MappingProxyType({}),
) -> Iterator[None]:
    """Let linear layers compute with weights and adapters that are trained inside a `with` statement.

    Args:
        layers: the layers.
        codes: the weight of each layer.
        corrections: the adapters of some of them.
    """
    modules = [layers[name].module for name in codes]
    functions = [
        partial(_linear, module, one, corrections.get(name))
        for module, (name, one) in zip(modules, codes.items(), strict=True)
    ]
    with forward_replaced(modules, functions):
        yield


def _linear(module: nn.Module, codes: TrainedCodes, correction: Correction | None, inputs: Tensor) -> Tensor:
    bias: Any = getattr(module, "bias", None)
    weight = codes.values()
    output = functional.linear(inputs, weight.to(inputs.dtype), bias)
    if correction is None:
        return output
    return output + correction.family.output(correction.parameters, inputs.float(), weight).to(output.dtype)
