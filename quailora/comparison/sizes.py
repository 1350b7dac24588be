"""Families of adapters that are as large as LoRA of a rank, in numbers that are trained or in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, final

from ..errors import ConfigurationError, TargetError
from ..families import Family, Lora, find_family
from ..models.layers import Layer

Equal = Literal["numbers", "bytes", "defaults"]
"""What families have in common: the numbers that are trained, the bytes of the file, or nothing, at PEFT's defaults."""

_LARGER = 1.05  # times LoRA's size, at most
_HIGHEST = 4  # times PEFT's default rank, or that of LoRA: no higher rank is tried


@final
@dataclass(frozen=True)
class ComparedFamilies:
    """The families of adapters that a comparison has beside LoRA.

    Attributes:
        families: families, or their names.
        equal: what makes each as large as LoRA: the numbers that are trained, or the bytes in the file; "defaults"
            takes PEFT's default sizes.
    """

    families: tuple[Family | str, ...] = ()
    equal: Equal = "numbers"

    @property
    def chosen(self) -> list[Family]:
        """The families, without LoRA, which is always there.

        Raises:
            ConfigurationError: if there is none of a name.
        """
        made = [find_family(family)() if isinstance(family, str) else family for family in self.families]
        return [family for family in made if family.name != "lora"]

    def sized(self, rank: int, layers: Mapping[str, Layer]) -> list[Sized]:
        """Return the families of the size that LoRA has at a rank.

        Args:
            rank: rank of LoRA.
            layers: the layers that get an adapter.

        Raises:
            ConfigurationError: if no size of a family is small enough.
            TargetError: if a layer cannot carry a family at PEFT's default size.
        """
        return [of_size(family, rank, layers, self.equal) for family in self.chosen]


@final
@dataclass(frozen=True)
class Sized:
    """A family of adapters of some size.

    Attributes:
        family: the family.
        rank: its rank, or what it has in place of one; without meaning for families that have none.
    """

    family: Family
    rank: int

    @property
    def title(self) -> str:
        """Name of the family, with its rank."""
        name = self.family.title
        return name if self.family.default_rank is None else f"{name} {self.rank}"


def of_size(family: Family, rank: int, layers: Mapping[str, Layer], equal: Equal) -> Sized:
    """Return a family of the size that LoRA has at a rank; see `ComparedFamilies`."""
    if equal == "defaults":
        return Sized(family, family.default_rank or rank)
    budget = _LARGER * total(Lora(), rank, layers, equal)
    if family.default_rank is None:
        shapes = [layer.shape for layer in layers.values()]
        return Sized(family.resized(shapes, round(budget / _LARGER)), rank)
    # All ranks are tried: some shapes carry certain ranks only, and some adapters are smaller with a higher rank.
    sizes: dict[int, int] = {}
    for size in range(1, _HIGHEST * max(rank, family.default_rank) + 1):
        with suppress(TargetError):
            sizes[size] = total(family, size, layers, equal)
    best = max((size for size in sizes if sizes[size] <= budget), key=lambda size: sizes[size], default=None)
    if best is None:
        raise ConfigurationError(
            f"The family {family.title} is larger than LoRA of rank {rank} at every size, or no layer can "
            "carry it. Compare at PEFT's defaults with `equal='defaults'`, or at a higher rank."
        )
    return Sized(family, best)


def total(family: Family, rank: int, layers: Mapping[str, Layer], equal: Equal) -> int:
    """Return the numbers of an adapter for all layers that are trained, or all that are in its file."""
    shapes = Counter(layer.shape for layer in layers.values())
    if equal == "numbers":
        return sum(often * family.count(shape, rank) for shape, often in shapes.items())
    here = sum(often * family.numbers(shape, rank) for shape, often in shapes.items())
    return here + family.shared_numbers({name: layer.shape for name, layer in layers.items()}, rank)
