"""NormalFloat4 through bitsandbytes, the format of QLoRA (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..core.statistics import InputStatistics
from .base import Quantizer
from .fourbit import BlockSize, FourBitWeight, check_block_size, encode_four_bit, four_bit_config
from .nf4_gptq import NF4GPTQ, feedback_of_nf4
from .nf4_mse import NF4MSE


@final
@dataclass(frozen=True)
class NF4(Quantizer):
    """4 bits: nearest of 16 normal quantiles, scaled by each block's largest magnitude.

    Equivalent to loading with `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`: the same kernels
    give the same codes. Idempotent without double quantization.

    Attributes:
        block_size: weights that share a scale.
        double_quantization: store the scales in 8 bits (`bnb_4bit_use_double_quant`): 4.13 instead of 4.5 bits per
            weight at block size 64.
    """

    name: ClassVar[str] = "nf4"

    block_size: BlockSize = 64
    double_quantization: bool = True

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> FourBitWeight:
        del statistics
        return encode_four_bit(weight, "nf4", self.block_size, self.double_quantization)

    @override
    def with_feedback(self, damping: float | None = None) -> NF4GPTQ:
        return feedback_of_nf4(self.block_size, self.double_quantization, damping)

    @override
    def with_least_error(self) -> NF4MSE:
        return NF4MSE(self.block_size, self.double_quantization)

    @override
    def stock_config(self) -> dict[str, object] | None:
        return four_bit_config("nf4", self.block_size, self.double_quantization)
