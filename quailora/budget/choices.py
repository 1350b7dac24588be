"""What a layer can become: a quantizer and a rank, or full precision; and how many bytes that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from ..errors import ConfigurationError, check_choice
from ..models.layers import Layer
from ..pipeline.formats import FULL_BITS, example_by, full_bits
from ..quantizers import NF4, Quantizer, Uniform
from ..support.choices import PLANNED_GROUP_SIZES
from ..support.settings import build, describe

PlanFormat = Literal["gptq", "bitsandbytes"]
"""Which checkpoint the base of a plan becomes: AutoGPTQ's, with bits for each layer, or bitsandbytes' of 4 bits."""

_STOCK_BITS = 4  # of bitsandbytes' codes, which have no field that says so

_NARROW = 32  # largest group for codes of 2 bits, whose scales are worth more than their bytes


@final
@dataclass(frozen=True)
class Choice:
    """What a layer can become.

    Attributes:
        quantizer: quantizer of the layer; None for a layer in full precision.
        rank: rank of its adapter; 0 for none. A layer in full precision has none.
    """

    quantizer: Quantizer | None
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.quantizer is None and self.rank):
            raise ConfigurationError(
                f"Expected a rank of 0 or more, and of 0 in full precision, got {self.rank} for {self.quantizer!r}."
            )

    @property
    def title(self) -> str:
        """The choice in a few words, such as `3 bits + rank 16`."""
        return f"{self.base} + rank {self.rank}" if self.rank else self.base

    @property
    def bits(self) -> int:
        """Bits of a code; 16 in full precision."""
        return FULL_BITS if self.quantizer is None else getattr(self.quantizer, "bits", _STOCK_BITS)

    @property
    def base(self) -> str:
        """The base in a few words, such as `3 bits g64` for groups of 64 columns."""
        if self.quantizer is None:
            return f"{FULL_BITS} bits"
        bits, size = (getattr(self.quantizer, name, None) for name in ("bits", "group_size"))
        return self.quantizer.name if bits is None else f"{bits} bits" + (f" g{size}" if size else "")

    def nbytes(self, layer: Layer) -> int:
        """Return the bytes of a layer and its adapter: codes, scales, zero points, and factors in 16 bits."""
        rows, columns = layer.shape
        bits = full_bits(layer) if self.quantizer is None else written_bits(self.quantizer, layer)
        return round((rows * columns * bits + self.rank * (rows + columns) * FULL_BITS) / 8)

    def is_possible(self, layer: Layer) -> bool:
        """Return whether a layer can become this: a checkpoint holds its codes, and it can carry the rank."""
        return self.is_packed(layer) and self.rank <= min(layer.shape)

    def is_packed(self, layer: Layer) -> bool:
        """Return whether the codes of a layer fill whole words of 32 bits, without which no checkpoint holds them."""
        # bitsandbytes and full precision have no such words, and 32 bits fill one always.
        bits = getattr(self.quantizer, "bits", 32)
        return all(side * bits % 32 == 0 for side in layer.shape)

    def as_dict(self) -> dict[str, Any]:
        """Return the choice as plain data."""
        return {"quantizer": None if self.quantizer is None else describe(self.quantizer), "rank": self.rank}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Choice:
        """Build what `as_dict` returned, after a trip through JSON.

        Raises:
            ModelError: if the quantizer is unknown here.
        """
        described = content["quantizer"]
        return cls(None if described is None else build(Quantizer, described), content["rank"])  # type: ignore[type-abstract]


@final
@dataclass(frozen=True)
class PlannedLayer:
    """What a layer becomes.

    Attributes:
        choice: its quantizer and its rank.
        weights: number of its weights.
        nbytes: bytes of base and adapter.
        divergence: divergence that its error is expected to cost, in nats per token; 0 where it was not measured.
    """

    choice: Choice
    weights: int
    nbytes: int
    divergence: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the layer as plain data."""
        numbers = {"weights": self.weights, "bytes": self.nbytes, "divergence": self.divergence}
        return {**self.choice.as_dict(), **numbers}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> PlannedLayer:
        """Build what `as_dict` returned, after a trip through JSON.

        Raises:
            ModelError: if the quantizer is unknown here.
        """
        numbers = int(content["weights"]), int(content["bytes"]), float(content["divergence"])
        return cls(Choice.read(content), *numbers)


def written_bits(quantizer: Quantizer, layer: Layer) -> float:
    """Return the bits that a layer takes for each weight in the checkpoint that holds it."""
    example = example_by(quantizer, layer.shape)
    packed = example.packed()
    if "qweight" not in packed:
        return example.bits_per_weight
    # AutoGPTQ's format also has the zero points of symmetric levels, which are all the same.
    numbers = [packed[part] for part in ("qweight", "qzeros", "scales")]
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in numbers) / math.prod(example.shape)


def column_bytes(choices: Sequence[Choice], layers: Mapping[str, Layer]) -> int:
    """Return the bytes that the order of the columns takes in AutoGPTQ's format, 4 for each column; 0 in others."""
    quantizer = next(choice.quantizer for choice in choices if choice.quantizer is not None)
    shapes = [layer.shape for layer in layers.values()]
    grouped = any("g_idx" in example_by(quantizer, shape).packed() for shape in shapes)
    return sum(4 * columns for _, columns in shapes) if grouped else 0


def possible_choices(
    base_format: PlanFormat,
    bits: Sequence[int],
    ranks: Sequence[int],
    group_sizes: Sequence[int] = PLANNED_GROUP_SIZES,
    *,
    symmetric: bool = False,
) -> tuple[Choice, ...]:
    """Return every combination of bits and ranks that checkpoints of a format hold, cheapest bits first.

    Args:
        base_format: format of the base.
        bits: bits to choose from; 16 leaves a layer in full precision, without an adapter.
        ranks: ranks to choose from.
        group_sizes: columns that share a scale in AutoGPTQ's format; see `group_sizes_of`.
        symmetric: whether levels are symmetric around zero in AutoGPTQ's format.

    Raises:
        ConfigurationError: if the format does not hold layers of these bits, or there is nothing to choose.
    """
    check_choice("a format", base_format, ("gptq", "bitsandbytes"))
    known = (2, 3, 4, 8, FULL_BITS) if base_format == "gptq" else (4, FULL_BITS)
    wrong = [one for one in bits if one not in known]
    if wrong or not bits or not ranks or min(ranks) < 0:
        raise ConfigurationError(
            f"Expected bits among {', '.join(map(str, known))} for a base of {base_format}, and ranks of 0 or more, "
            f"got bits {list(bits)} and ranks {list(ranks)}."
        )
    found: list[Choice] = []
    for width in sorted(set(bits)):
        if width == FULL_BITS:
            found.append(Choice(None))
            continue
        quantizers: Sequence[Quantizer] = [NF4()]
        if base_format == "gptq":
            quantizers = [Uniform(width, size, symmetric) for size in group_sizes_of(width, group_sizes)]
        found += [Choice(quantizer, rank) for quantizer in quantizers for rank in sorted(set(ranks))]
    if all(choice.quantizer is None for choice in found):
        raise ConfigurationError("Expected bits below 16 to choose from, got 16 only. There is nothing to plan.")
    return tuple(found)


def group_sizes_of(bits: int, asked: Sequence[int]) -> list[int | None]:
    """Return how many columns share a scale in layers of some bits, cheapest first; None for a whole row.

    Layers of 4 bits have each of the sizes that are asked for, and layers of 3 bits the largest one. Layers of 2 bits
    have the largest one up to 32, and those of 8 bits one scale a row.

    Raises:
        ConfigurationError: if no size is asked for, or one is below 1.
    """
    if not asked or min(asked) < 1:
        raise ConfigurationError(f"Expected sizes of groups of 1 or more, such as 64, got {list(asked)}.")
    # The step from 4 to 8 bits is a large one, and a scale for fewer columns makes a smaller one. Below 4 bits another
    # bit takes off more of the error for its bytes, except for 2 bits, which are too coarse for large groups. With 8
    # bits nothing is left to gain from groups.
    if bits == 8:
        return [None]
    if bits == 2:
        return [max((size for size in asked if size <= _NARROW), default=_NARROW)]
    return [max(asked)] if bits == 3 else [*sorted(set(asked), reverse=True)]
