"""What calibration keeps of a layer's inputs: their second moment, mean and mean magnitude, and single samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import CalibrationError, NumericalError
from .linalg import blend, same_device, self_product
from .samples import Samples

CHUNK_TOKENS = 8192
"""Tokens per float32 product; keeps its rounding error near 1e-7 of the largest entry."""

_NORMAL = 2 / math.pi  # square of the mean magnitude of a standard normal number

Derived = TypeVar("Derived")


class InputStatistics:
    """Running second moment `H = mean(x x^T)` of the inputs `x` of one linear layer, their mean, and mean magnitude.

    Products are formed in float32 (float64 for float64 inputs) over at most 8192 tokens at a time and averaged in
    float64, so nothing is lost over millions of tokens. The mean is over real tokens only, so batches of any size and
    any padding weigh each token once.

    What depends on `H` alone (a working copy in float32, a Cholesky factor) is computed once and shared by all layers,
    ranks and quantizers that ask; see `cached`.

    Laws: merging partial statistics in any order equals accumulating all tokens at once, but for `samples`; masked
    tokens have no effect.

    Attributes:
        tokens: number of tokens in the mean.
    """

    tokens: int

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._mean = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._average: Tensor | None = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._samples = Samples.none(in_features, device)
        self._derived: dict[Hashable, Any] = {}
        self.tokens = 0

    def __repr__(self) -> str:
        return f"InputStatistics(in_features={self.in_features}, tokens={self.tokens})"

    @classmethod
    def from_inputs(
        cls, inputs: Float[Tensor, "*batch in_features"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> InputStatistics:
        """Return the statistics of one batch of inputs; see `update` for the arguments."""
        statistics = cls(inputs.shape[-1], inputs.device)
        statistics.update(inputs, mask)
        return statistics

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return len(self._mean)

    @property
    def second_moment(self) -> Float[Tensor, "in_features in_features"]:
        """`H = mean(x x^T)` per token, float64: the buffer itself, no copy.

        Raises:
            CalibrationError: if no token has been seen.
        """
        if self.tokens == 0:
            raise CalibrationError(
                "Expected at least one calibration token, got none. Feed inputs with `update` first."
            )
        return self._mean

    @property
    def mean_magnitude(self) -> Float[Tensor, " in_features"]:
        """`mean(|x|)` of each input channel, float64: the buffer itself, no copy."""
        return self._magnitude

    @property
    def mean(self) -> Float[Tensor, " in_features"] | None:
        """`mean(x)` of each input channel, float64: the buffer itself. None where some tokens came without a sum."""
        return self._average

    @property
    def samples(self) -> Samples:
        """What is kept of the first 128 samples; none of those of which only sums are known."""
        return self._samples

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: shape (..., in_features), any float dtype, on any device.
            mask: bool, shape (...): True for real tokens, False for padding; every token counts if it is missing.

        Raises:
            ValueError: if the width is not this layer's, or the mask does not fit.
            NumericalError: if an input is NaN or infinite.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"Expected inputs of width {self.in_features}, got shape {tuple(inputs.shape)}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:-1]):
            expected = tuple(inputs.shape[:-1])
            raise ValueError(f"Expected a bool mask of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}.")
        inputs = inputs.detach()
        self._samples = self._samples.with_batch(inputs, mask)
        tokens = inputs.reshape(-1, self.in_features) if mask is None else inputs[mask.to(inputs.device)]
        working = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        for chunk in torch.split(tokens, CHUNK_TOKENS):
            product = self_product(chunk.to(working))
            if not product.diagonal().isfinite().all():
                raise NumericalError(
                    "Expected finite calibration inputs, got NaN or infinity. Try another model dtype."
                )
            total = chunk.sum(0, dtype=torch.float64)
            self.add(product, len(chunk), chunk.abs().sum(0, dtype=torch.float64), total)

    def add(
        self,
        product: Float[Tensor, "in_features in_features"],
        tokens: int,
        magnitude: Float[Tensor, " in_features"] | None = None,
        total: Float[Tensor, " in_features"] | None = None,
    ) -> None:
        """Add tokens of which only sums are known.

        Args:
            product: the sum of `x x^T` over these tokens, symmetric, on any device.
            tokens: how many tokens they are; with 0 nothing changes.
            magnitude: the sum of `|x|`; where it is missing, that of normal inputs with the same second moment.
            total: the sum of `x`; without it the mean of all tokens is unknown from now on.
        """
        # A mean over n tokens and the sum s over k more give the mean n / (n + k) * mean + s / (n + k). A mean is kept
        # in place of a sum because it does not grow with the number of tokens, and can be read without a copy.
        if tokens:
            self.tokens += tokens
            blend(self._mean, product, tokens / self.tokens, 1 / self.tokens)
            # A normal number of variance v has the mean magnitude sqrt(2 v / pi); here it is summed over the tokens.
            if magnitude is None:
                magnitude = (_NORMAL * tokens * product.diagonal().clamp(min=0)).sqrt()
            blend(self._magnitude, magnitude, tokens / self.tokens, 1 / self.tokens)
            self._blend_average(total, tokens / self.tokens, 1 / self.tokens)
            self.clear_cache()

    def _blend_average(self, more: Tensor | None, share: float, weight: float) -> None:
        if self._average is None or more is None:
            self._average = None
        else:
            blend(self._average, more, share, weight)

    def cached(self, key: Hashable, compute: Callable[[], Derived]) -> Derived:
        """Return what was computed under this key since the last `update` or `clear_cache`, or compute it now.

        Args:
            key: names the result, with every parameter that it depends on.
            compute: called without arguments if there is no result yet.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        derived: Derived = self._derived[key]
        return derived

    def clear_cache(self) -> None:
        """Free what `cached` has kept."""
        self._derived.clear()

    def merge(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of both sets of tokens together.

        Raises:
            ValueError: if the widths differ.
        """
        merged = InputStatistics(self.in_features, self._mean.device)
        merged.include(self)
        merged.include(other)
        return merged

    def include(self, other: InputStatistics) -> None:
        """Add the tokens of other statistics in place, which takes no memory.

        Raises:
            ValueError: if the widths differ.
        """
        if other.in_features != self.in_features:
            raise ValueError(f"Expected statistics of width {self.in_features}, got {other.in_features}.")
        if other.tokens:
            self.tokens += other.tokens
            share = other.tokens / self.tokens
            blend(self._mean, other._mean, share, share)
            blend(self._magnitude, other._magnitude, share, share)
            self._blend_average(other._average, share, share)
            self._samples = self._samples.joined(other._samples)
            self.clear_cache()

    def without(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of these tokens without some that are among them, and fewer; without samples.

        Raises:
            ValueError: if the other statistics have as many tokens or more.
        """
        tokens = self.tokens - other.tokens
        if tokens <= 0:
            raise ValueError(f"Expected fewer than {self.tokens} tokens to leave out, got {other.tokens}.")
        # mean = (k other + (n - k) left) / n, solved for what is left: n / (n - k) * mean - k / (n - k) * other.
        left = InputStatistics(self.in_features, self._mean.device)
        left.include(self)
        share = -other.tokens / tokens
        blend(left._mean, other._mean, share, share)
        blend(left._magnitude, other._magnitude, share, share)
        left._blend_average(other._average, share, share)
        left._samples = Samples.none(self.in_features, self._mean.device)
        left.tokens = tokens
        return left

    def pool(self, add_up: Callable[[Tensor], Tensor], gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Become the statistics of the tokens of all processes, in place.

        Args:
            add_up: sums a tensor over all processes in place, and returns it.
            gather: returns the tensors of all processes, of any shapes.
        """
        # Each process scales its mean by its share of all tokens; the sum of these is the mean over all of them.
        tokens = int(add_up(torch.tensor(self.tokens, device=self._mean.device)))
        for mean in (self._mean, self._magnitude, *([] if self._average is None else [self._average])):
            add_up(mean.mul_(self.tokens / max(1, tokens)))
        self._samples = self._samples.gathered(gather)
        self.tokens = tokens
        self.clear_cache()

    def to(self, device: torch.device | str) -> InputStatistics:
        """Return these statistics on `device` (themselves, if they are there already)."""
        if same_device(self._mean, device):
            return self
        moved = InputStatistics(self.in_features, device)
        moved.include(self)
        return moved

    def save(self, path: str | Path) -> None:
        """Write the statistics as one safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            "second_moment": self._mean,
            "mean_magnitude": self._magnitude,
            "sample_means": self._samples.means,
            "sample_firsts": self._samples.firsts,
            "tokens": torch.tensor(self.tokens),
        }
        if self._average is not None:
            tensors["mean"] = self._average
        save_file(tensors, path, metadata={"format": "pt", "kind": "quailora.InputStatistics"})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> InputStatistics:
        """Read statistics that `save` wrote.

        Raises:
            CalibrationError: if the file does not hold input statistics.
        """
        from safetensors.torch import load_file

        tensors = load_file(path, device=str(device))
        # Files of earlier versions have no mean and no samples.
        average, means, firsts = (tensors.pop(name, None) for name in ("mean", "sample_means", "sample_firsts"))
        expected = ["mean_magnitude", "second_moment", "tokens"]
        if sorted(tensors) != expected:
            raise CalibrationError(f"Expected the tensors {', '.join(expected)} in {path}, got {sorted(tensors)}.")
        statistics = cls(0, device)
        statistics._mean, statistics._magnitude = tensors["second_moment"], tensors["mean_magnitude"]
        statistics._average = average
        statistics._samples = Samples.none(statistics.in_features, device)
        if means is not None and firsts is not None:
            statistics._samples = Samples(means, firsts)
        statistics.tokens = int(tensors["tokens"])
        return statistics
