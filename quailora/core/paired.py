"""What calibration keeps of a layer's inputs in two networks: the full-precision one and the quantized one."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NumericalError
from .linalg import blend, same_device
from .statistics import CHUNK_TOKENS, InputStatistics


@final
class PairedStatistics:
    """Running moments of the inputs `x` of one linear layer in full precision, and `x~` in the quantized network.

    Fitting a layer to outputs in full precision needs two matrices: `H~ = E[x~ x~^T]`, and the difference of
    `G = E[x x~^T]` and `H~`. The difference is summed up directly, so that it has the precision of the small
    difference between the networks.

    Laws: as for `InputStatistics`.

    Attributes:
        quantized: statistics of `x~`, with the second moment `H~`.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.quantized = InputStatistics(in_features, device)
        self._gap = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"PairedStatistics(in_features={self.in_features}, tokens={self.tokens})"

    @classmethod
    def from_inputs(
        cls, full: Float[Tensor, "*batch in_features"], quantized: Float[Tensor, "*batch in_features"]
    ) -> PairedStatistics:
        """Return the statistics of one batch of inputs; see `update` for the arguments."""
        statistics = cls(quantized.shape[-1], quantized.device)
        statistics.update(full, quantized)
        return statistics

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return self.quantized.in_features

    @property
    def tokens(self) -> int:
        """Number of tokens in the means."""
        return self.quantized.tokens

    @property
    def gap(self) -> Float[Tensor, "in_features in_features"]:
        """`E[(x - x~) x~^T] = G - H~`, float64: the buffer itself, no copy."""
        return self._gap

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Add a batch of inputs.

        Args:
            full: inputs in the full-precision network, shape (..., in_features), any float dtype.
            quantized: inputs of the same tokens in the quantized network, same shape.

        Raises:
            ValueError: if the width is not this layer's, or the shapes differ.
            NumericalError: if an input is NaN or infinite.
        """
        if full.shape != quantized.shape:
            raise ValueError(f"Expected inputs of equal shapes, got {tuple(full.shape)} and {tuple(quantized.shape)}.")
        before = self.tokens
        self.quantized.update(quantized)
        working = torch.promote_types(quantized.dtype, torch.float32)
        parts = (
            torch.split(tensor.detach().reshape(-1, self.in_features), CHUNK_TOKENS) for tensor in (full, quantized)
        )
        for full_rows, quantized_rows in zip(*parts, strict=True):
            if not len(quantized_rows):
                continue
            # (x - x~) x~^T, and not x x~^T less x~ x~^T: the networks differ by little, and a difference of two large
            # means would lose as many digits as they have in common.
            right = quantized_rows.to(working)
            left = full_rows.to(working) - right
            product = right.new_empty(self.in_features, self.in_features)
            torch.mm(left.T, right, out=product)  # a product with `out` is not autocast
            if not product.diagonal().isfinite().all():
                raise NumericalError(
                    "Expected finite calibration inputs, got NaN or infinity. Try another model dtype."
                )
            before += len(quantized_rows)
            blend(self._gap, product, len(quantized_rows) / before, 1 / before)

    def merge(self, other: PairedStatistics) -> PairedStatistics:
        """Return the statistics of both sets of tokens together.

        Raises:
            ValueError: if the widths differ.
        """
        merged = PairedStatistics(self.in_features, self.gap.device)
        merged.include(self)
        merged.include(other)
        return merged

    def include(self, other: PairedStatistics) -> None:
        """Add the tokens of other statistics in place, which takes no memory.

        Raises:
            ValueError: if the widths differ.
        """
        self.quantized.include(other.quantized)
        if other.tokens:
            share = other.tokens / self.tokens
            blend(self._gap, other.gap, share, share)

    def pool(self, add_up: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Become the statistics of all processes together; see `InputStatistics.pool`."""
        tokens = self.tokens
        self.quantized.pool(add_up, gather)
        add_up(self._gap.mul_(tokens / max(1, self.tokens)))

    def to(self, device: torch.device | str) -> PairedStatistics:
        """Return these statistics on `device` (themselves, if they are there already)."""
        if same_device(self.gap, device):
            return self
        moved = PairedStatistics(self.in_features, device)
        moved.include(self)
        return moved

    def clear_cache(self) -> None:
        """Free what was derived; see `InputStatistics.cached`."""
        self.quantized.clear_cache()
