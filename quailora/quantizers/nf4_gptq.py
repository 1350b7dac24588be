"""NF4 codes chosen with error feedback, in bitsandbytes' own format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.metrics import SHRINKAGE, check_damping, check_shrinkage
from ..core.statistics import InputStatistics
from ..errors import check_choice
from .base import Quantizer
from .fourbit import (
    BlockSize,
    Codebook,
    FourBitWeight,
    ScaledCodebook,
    check_block_size,
    encode_four_bit,
    scales_of,
    with_codes,
    with_least_error,
)
from .gptq import better_of, damped_factor, sweep


@final
@dataclass(frozen=True)
class NF4GPTQ(Quantizer):
    """NF4 with the scales of nearest rounding, and the codes of a GPTQ sweep.

    bitsandbytes stores codes and scales, and does not ask how the codes were found: the result is a 4-bit checkpoint
    like any other. Columns are rounded in turn, left to right, and those still to come make up for the error made.
    If the sweep ends no better than rounding to nearest, in the metric of `H`, the latter is returned.

    Attributes:
        block_size: weights that share a scale.
        double_quantization: store the scales in 8 bits (`bnb_4bit_use_double_quant`).
        damping: added to the diagonal of `H`, relative to the `damping_scale` of that diagonal.
        damping_scale: "mean" or "median"; see `GPTQ`.
        mse: scales with the least squared error, in place of those of nearest rounding.
        shrinkage: share of the correlations between input channels that is taken off `H`; see `GPTQ`.
    """

    name: ClassVar[str] = "nf4_gptq"

    block_size: BlockSize = 64
    double_quantization: bool = True
    damping: float = 0.01
    damping_scale: Literal["mean", "median"] = "median"
    mse: bool = False
    shrinkage: float = SHRINKAGE

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_choice("a damping_scale", self.damping_scale, ("mean", "median"))
        check_damping(self.damping)
        check_shrinkage(self.shrinkage)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> FourBitWeight:
        assert statistics is not None  # `quantize` has checked it
        statistics = statistics.to(weight.device)
        nearest = encode_four_bit(weight, "nf4", self.block_size, self.double_quantization)
        nearest = with_least_error(nearest, weight) if self.mse else nearest
        scales = scales_of(nearest)
        full = weight.float()
        columns = full.T.clone(memory_format=torch.contiguous_format)
        _, _, factor = damped_factor(statistics, self.damping, self.damping_scale, self.shrinkage)
        codebook = Codebook.of(nearest.state.code.to(full.device))
        codes, _ = sweep(columns, factor, lambda column: ScaledCodebook(codebook, scales[:, column]))
        return better_of(with_codes(nearest, codes.T), nearest, weight, statistics)

    @override
    def with_feedback(self, damping: float | None = None) -> NF4GPTQ:
        return self if damping is None else replace(self, damping=damping)

    @override
    def with_least_error(self) -> Quantizer:
        from .nf4_mse import NF4MSE  # whose feedback is this module's

        return NF4MSE(self.block_size, self.double_quantization)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


def feedback_of_nf4(
    block_size: BlockSize, double_quantization: bool, damping: float | None, *, mse: bool = False
) -> NF4GPTQ:
    """Return error feedback as published, with nothing shrunk, for an NF4 format; see `Quantizer.with_feedback`."""
    damping = NF4GPTQ.damping if damping is None else damping
    return NF4GPTQ(block_size, double_quantization, damping=damping, mse=mse, shrinkage=0.0)
