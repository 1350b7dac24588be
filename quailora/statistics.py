"""What calibration keeps of a layer's inputs: their second moment."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import CalibrationError, NumericalError

_CHUNK_TOKENS = 8192  # tokens per float32 product; keeps its rounding error near 1e-7 of the largest entry


class InputStatistics:
    """Running second moment `H = mean(x x^T)` of the inputs `x` of one linear layer.

    Products are formed in float32 (float64 for float64 inputs) over at most 8192 tokens at a time and summed in
    float64, so nothing is lost over millions of tokens. The sum is over real tokens only, and the mean divides by
    their number, so batches of any size and any padding weigh each token once.

    Laws: merging partial statistics in any order equals accumulating at once; masked tokens count nothing.

    Attributes:
        total: sum of `x x^T`, shape (in_features, in_features), float64.
        tokens: number of tokens in the sum.
    """

    total: Float[Tensor, "in_features in_features"]
    tokens: int

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
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
        return len(self.total)

    @property
    def second_moment(self) -> Float[Tensor, "in_features in_features"]:
        """`H = mean(x x^T)` per token, float64.

        Raises:
            CalibrationError: if no token has been seen.
        """
        if self.tokens == 0:
            raise CalibrationError(
                "Expected at least one calibration token, got none. Feed inputs with `update` first."
            )
        return self.total / self.tokens

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: shape (..., in_features), any float dtype.
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
        tokens = inputs.reshape(-1, self.in_features) if mask is None else inputs[mask]
        working = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS].to(working)
            product = chunk.T @ chunk
            if not product.diagonal().isfinite().all():
                raise NumericalError(
                    "Expected finite calibration inputs, got NaN or infinity. Try another model dtype."
                )
            self.total += product
        self.tokens += len(tokens)

    def merge(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of both sets of tokens together.

        Raises:
            ValueError: if the widths differ.
        """
        if other.in_features != self.in_features:
            raise ValueError(f"Expected statistics of width {self.in_features}, got {other.in_features}.")
        merged = InputStatistics(self.in_features, self.total.device)
        merged.total = self.total + other.total.to(self.total.device)
        merged.tokens = self.tokens + other.tokens
        return merged

    def to(self, device: torch.device | str) -> InputStatistics:
        """Return these statistics on `device` (themselves, if they are there already)."""
        if self.total.device == torch.device(device):
            return self
        return InputStatistics(self.in_features, device).merge(self)

    def save(self, path: str | Path) -> None:
        """Write the statistics as one safetensors file."""
        from safetensors.torch import save_file

        tensors = {"total": self.total.contiguous(), "tokens": torch.tensor(self.tokens)}
        save_file(tensors, path, metadata={"format": "pt", "kind": "quailora.InputStatistics"})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> InputStatistics:
        """Read statistics that `save` wrote.

        Raises:
            CalibrationError: if the file does not hold input statistics.
        """
        from safetensors.torch import load_file

        tensors = load_file(path, device=str(device))
        if set(tensors) != {"total", "tokens"}:
            raise CalibrationError(f"Expected tensors 'total' and 'tokens' in {path}, got {sorted(tensors)}.")
        statistics = cls(len(tensors["total"]), device)
        statistics.total += tensors["total"]
        statistics.tokens = int(tensors["tokens"])
        return statistics
