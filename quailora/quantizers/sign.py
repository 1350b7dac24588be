"""One bit a weight: the sign, and the mean magnitude of each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from typing_extensions import override

from ..core.statistics import InputStatistics
from ..errors import NumericalError
from .base import QuantizedWeight, Quantizer
from .groups import check_group_size, over_columns, split_groups
from .packing import pack, unpack


@final
@dataclass(frozen=True, eq=False)
class SignWeight(QuantizedWeight):
    """A bit for each weight, and a float16 scale for each group of a row. No package computes with it as it is stored.

    Attributes:
        codes: packed bits, row-major; 1 stands for plus.
        scale: float16, a row's groups in order.
        group_size: columns that share a scale.
        columns: `in_features`.
        dtype: dtype of the weight that was quantized.
    """

    codes: UInt8[Tensor, " packed"]
    scale: Float[Tensor, "out_features groups"]
    group_size: int
    columns: int
    dtype: torch.dtype

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return len(self.scale), self.columns

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        return self.decode(self.code_matrix()).to(self.dtype)

    @property
    @override
    def scale_count(self) -> int:
        return self.scale.numel()

    @override
    def spread(self, factors: Float[Tensor, " scales"]) -> Float[Tensor, "out_features in_features"]:
        return over_columns(factors.view(self.scale.shape), self.group_size, self.columns)

    @override
    def rescaled(self, factors: Float[Tensor, " scales"]) -> SignWeight:
        return replace(self, scale=(self.scale.float() * factors.view(self.scale.shape).to(self.scale.device)).half())

    @property
    @override
    def code_count(self) -> int:
        return 2

    @override
    def on(self, device: torch.device) -> SignWeight:
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    @override
    def code_matrix(self) -> UInt8[Tensor, "out_features in_features"]:
        return unpack(self.codes, 1, self.shape)

    @override
    def decode(self, codes: Shaped[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        # Bits 0 and 1 stand for minus and plus.
        return (2 * codes.float() - 1) * self.spread(self.scale.float().flatten())

    @override
    def recoded(self, codes: Shaped[Tensor, "out_features in_features"]) -> SignWeight:
        return replace(self, codes=pack(codes.to(torch.uint8), 1))


@final
@dataclass(frozen=True)
class Sign(Quantizer):
    """1 bit: the sign of each weight, times the mean magnitude of its group, as a float16 scale.

    For given signs no other scale has less squared error (Rastegari et al., 2016, "XNOR-Net", arXiv 1603.05279).

    Attributes:
        group_size: consecutive input columns that share a scale; None for one scale a row.
    """

    name: ClassVar[str] = "sign"

    group_size: int | None = 64

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_group_size(self.group_size)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> SignWeight:
        del statistics
        # |w - s sign(w)|^2 over a group is least at the mean of |w|, where its derivative in s is zero.
        group_size = self.group_size or weight.shape[1]
        scale = magnitudes(split_groups(weight.float(), group_size), weight.shape[1], group_size)
        return SignWeight(pack((weight >= 0).to(torch.uint8), 1), scale, group_size, weight.shape[1], weight.dtype)

    @override
    def with_feedback(self, damping: float | None = None) -> Quantizer:
        from .sign_gptq import SignGPTQ  # which rounds to the levels of this module

        return SignGPTQ(self.group_size, SignGPTQ.damping if damping is None else damping, shrinkage=0.0)

    @override
    def with_least_error(self) -> Sign:
        return self

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


def magnitudes(
    groups: Float[Tensor, "out_features groups group"], columns: int, group_size: int
) -> Float[Tensor, "out_features groups"]:
    """Return the mean magnitude of each group, float16; the last one may be shorter than the others.

    Raises:
        NumericalError: if one overflows float16.
    """
    # A last group that is short is filled with zeros, which add nothing to its sum and are not counted.
    sums = groups.abs().sum(-1)
    sizes = torch.full_like(sums[0], group_size)
    sizes[-1] = columns - (len(sizes) - 1) * group_size
    scale = (sums / sizes).half()
    if not scale.isfinite().all():
        raise NumericalError(
            f"Expected scales that fit float16, but a group has the mean magnitude {(sums / sizes).max().item():.3g}."
        )
    return scale
