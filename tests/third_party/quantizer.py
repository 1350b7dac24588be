"""The sign of each weight, with one scale for a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from quailora import InputStatistics, Quantizer
from quailora.quantizers import QuantizedWeight
from quailora.quantizers.packing import pack, unpack


@final
@dataclass(frozen=True, eq=False)
class SignedWeight(QuantizedWeight):
    """Packed signs, and the mean magnitude of each group of a row.

    Attributes:
        signs: one bit for each weight, packed.
        scales: (out_features, groups).
        columns: in_features.
    """

    signs: Tensor
    scales: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), self.columns

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, "scales": self.scales}

    def dequantize(self) -> Tensor:
        groups = self.scales.shape[1]
        scales = self.scales.repeat_interleave(-(-self.columns // groups), 1)[:, : self.columns]
        return (2 * unpack(self.signs, 1, self.shape).to(scales.dtype) - 1) * scales


@final
@dataclass(frozen=True)
class Signs(Quantizer):
    """One bit for each weight.

    Attributes:
        groups: scales in each row.
    """

    name: ClassVar[str] = "signs"

    groups: int = 1

    def encode(self, weight: Tensor, statistics: InputStatistics | None) -> SignedWeight:
        parts = weight.abs().split(-(-weight.shape[1] // self.groups), 1)
        scales = torch.stack([part.mean(1) for part in parts], 1)
        return SignedWeight(pack((weight >= 0).byte(), 1), scales, weight.shape[1])

    def stock_config(self) -> None:
        return None
