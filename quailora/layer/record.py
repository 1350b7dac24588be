"""The entry of the report for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..models.layers import kind
from ..quantizers.identity import BaseIdentity
from .initializer import LayerInitialization


@final
@dataclass(frozen=True)
class LayerRecord:
    """One layer of the report. Errors are `tr((E - C) H (E - C)^T)` in the Gram metric of the inputs fitted to.

    They are squared, totals over outputs, and means over tokens. `E` is `W - Q`; for asymmetric inputs it is the target
    less `Q`, so that errors are the distance to the target.

    Attributes:
        name: module name.
        shape: (out_features, in_features).
        rank: rank of the adapter, or what its family has in place of one.
        bits_per_weight: stored bits of the quantized weight, everything counted.
        tokens: calibration tokens that the layer saw.
        error_none: output error without correction.
        error_uncalibrated: output error with the plain SVD, or with the same family fitted without the inputs.
        error: output error with this adapter.
        error_optimal: the least for this rank; in wide layers a lower bound of it, see `Subspace.upper`; for families
            other than LoRA the error itself.
        relative_error: `error / tr(W H W^T)`.
        iterations: rounds that the solver ran.
        seconds: what it took to quantize and correct; what several methods share counts for the first of them.
        asymmetry: for asymmetric inputs, where the target lies between `W` (0) and the ridge estimate of `W*` (1).
        base: tells the quantized weight that the correction belongs to from others.
        parameters: numbers in the adapter of the layer; None in files of earlier versions, which had LoRA only.
        untrained: those of them that training leaves as they are, such as the places of entries.
        block_error: where blocks were trained: error of the outputs of the layer's block on held-out tokens before
            that, squared, relative to the squared norm of the output, as the mean over tokens. All other errors are
            those of the layer before this training.
        block_error_trained: the same after it.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    bits_per_weight: float
    tokens: int
    error_none: float
    error_uncalibrated: float
    error: float
    error_optimal: float
    relative_error: float
    iterations: int
    seconds: float = 0.0
    asymmetry: float | None = None
    base: BaseIdentity | None = None
    parameters: int | None = None
    untrained: int = 0
    block_error: float | None = None
    block_error_trained: float | None = None

    @property
    def numbers(self) -> int:
        """Numbers in the adapter of the layer."""
        return self.rank * sum(self.shape) if self.parameters is None else self.parameters

    @classmethod
    def of(
        cls,
        name: str,
        layer: LayerInitialization,
        weight: Tensor,
        tokens: int,
        rank: int,
        seconds: float = 0.0,
        asymmetry: float | None = None,
    ) -> LayerRecord:
        """Return the entry of an initialized layer with the full-precision weight `weight` and a rank."""
        numbers = {end: tensor.numel() for end, tensor in layer.correction.parameters.items()}
        return cls(
            name=name,
            shape=layer.quantized.shape,
            rank=0 if layer.correction.family.default_rank is None else rank,
            bits_per_weight=layer.quantized.bits_per_weight,
            tokens=tokens,
            error_none=layer.error_none,
            error_uncalibrated=layer.error_uncalibrated,
            error=layer.error,
            error_optimal=layer.error_optimal,
            relative_error=layer.relative_error,
            iterations=layer.fit.iterations,
            seconds=round(seconds, 4),
            asymmetry=asymmetry,
            base=BaseIdentity.of(layer.quantized, weight),
            parameters=sum(numbers.values()),
            untrained=sum(numbers[end] for end in layer.correction.family.untrained),
        )

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> LayerRecord:
        """Build what `dataclasses.asdict` wrote down, after a trip through JSON."""
        base = content.get("base")
        changed = {"shape": tuple(content["shape"]), "base": BaseIdentity.read(base) if base else None}
        return cls(**{**content, **changed})


def mean_bits(layers: Sequence[LayerRecord]) -> float:
    """Return the stored bits per weight over all layers together."""
    # Weighted by size: a mean over layers would count a small gate as much as a large projection.
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    return sum(size * layer.bits_per_weight for size, layer in zip(sizes, layers, strict=True)) / sum(sizes)


def error_reduction(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Return the mean over layers of each error as a share of the error without correction."""
    names = ("error_uncalibrated", "error", "error_optimal")
    damaged = [layer for layer in layers if layer.error_none > 0]
    return {
        name: sum(getattr(layer, name) / layer.error_none for layer in damaged) / max(1, len(damaged)) for name in names
    }


def by_ending(layers: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """Return the layers grouped by the last part of their names, such as `q_proj`."""
    groups: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        groups.setdefault(kind(layer.name), []).append(layer)
    return groups
