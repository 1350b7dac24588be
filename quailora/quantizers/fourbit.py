"""What NF4 and FP4 share: bitsandbytes' 4-bit storage, by its own kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from ..errors import check_choice
from .base import QuantizedWeight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
"""The block sizes that bitsandbytes' kernels know."""

SHARES = (1.06, 1.03, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73)
"""Of a block's largest magnitude, to choose its scale from where the squared error decides."""

_STOCK_BLOCK_SIZE = 64  # the only one that transformers can ask it for


def check_block_size(block_size: object) -> None:
    """Raise a `ConfigurationError` unless bitsandbytes' kernels know a block size; called when a quantizer is made."""
    check_choice("a block size", block_size, get_args(BlockSize))


@final
@dataclass(frozen=True, eq=False)
class FourBitWeight(QuantizedWeight):
    """Two codes to a byte and one scale for each block; scales may be stored in 8 bits with scales of their own.

    The format's fixed tables (16 values of a code, 256 of an 8-bit scale) are the same for every layer and not counted.

    Attributes:
        codes: packed 4-bit codes, row-major.
        state: bitsandbytes' description of the rest.
        dtype: dtype of the weight that was quantized.
    """

    layout: ClassVar[str] = "nf4"

    codes: UInt8[Tensor, "packed 1"]
    state: QuantState
    dtype: torch.dtype

    @property
    @override
    def shape(self) -> tuple[int, int]:
        rows, columns = self.state.shape
        return rows, columns

    @property
    @override
    def scale_count(self) -> int:
        rows, columns = self.shape
        size: int = self.state.blocksize
        return -(-rows * columns // size)

    @override
    def spread(self, factors: Float[Tensor, " scales"]) -> Float[Tensor, "out_features in_features"]:
        rows, columns = self.shape
        return factors.repeat_interleave(self.state.blocksize)[: rows * columns].view(rows, columns)

    @override
    def rescaled(self, factors: Float[Tensor, " scales"]) -> FourBitWeight:
        return with_scales(self, scales_of(self).flatten()[:: self.state.blocksize] * factors.to(self.codes.device))

    @property
    @override
    def code_count(self) -> int:
        return len(self.state.code)

    @override
    def on(self, device: torch.device) -> FourBitWeight:
        state = deepcopy(self.state)  # which bitsandbytes moves in place
        state.to(device)
        return replace(self, codes=self.codes.to(device), state=state)

    @override
    def code_matrix(self) -> UInt8[Tensor, "out_features in_features"]:
        pairs = self.codes.view(-1, 1)
        flat = torch.cat([pairs >> 4, pairs & 15], dim=1).flatten()
        # The table of NF4 ascends; that of FP4 has first the positive values and then the negative ones.
        rank = self.state.code.argsort(stable=True).argsort().to(torch.uint8)
        codes: Tensor = rank[flat[: math.prod(self.shape)].long()]
        return codes.view(self.shape)

    @override
    def decode(self, codes: Shaped[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        values: Tensor = self.state.code.sort(stable=True).values
        return values[codes.long()] * scales_of(self)

    @override
    def recoded(self, codes: Shaped[Tensor, "out_features in_features"]) -> FourBitWeight:
        return with_codes(self, self.state.code.argsort(stable=True)[codes.long()])

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        stored = {"codes": self.codes, "absmax": self.state.absmax}
        if self.state.nested:
            stored |= {"offset": self.state.offset, "nested_absmax": self.state.state2.absmax}
        return stored

    def rounded(self) -> frozenset[str]:
        """Return the 8-bit scales and their own: their offset is a mean, whose last digits depend on the threads."""
        return frozenset({"absmax", "offset", "nested_absmax"} if self.state.nested else ())

    def packed(self) -> Mapping[str, Tensor]:
        """Return the codes and bitsandbytes' own tensors for its state, if transformers knows the block size."""
        if self.state.blocksize != _STOCK_BLOCK_SIZE:
            return {}
        return {
            "weight": self.codes,
            **{f"weight.{key}": part for key, part in self.state.as_dict(packed=True).items()},
        }

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        from bitsandbytes.functional import dequantize_4bit

        # Blocks run on from one row to the next where they do not divide it. The kernel of bitsandbytes 0.50.2 for CPUs
        # begins a block with each row there, which decodes most weights with the scale of another block. It decodes the
        # same numbers rightly as one long row, as its kernel for GPUs does in any shape.
        state, (rows, columns) = self.state, self.shape
        if columns % state.blocksize:
            state = copy(state)
            state.shape = torch.Size((1, rows * columns))
        weight: Tensor = dequantize_4bit(self.codes, state)
        # bitsandbytes takes codes of one byte for a transposed matrix and returns them as a column.
        return weight.reshape(self.shape).to(self.dtype)


def encode_four_bit(
    weight: Float[Tensor, "out_features in_features"],
    quant_type: Literal["nf4", "fp4"],
    block_size: int,
    double_quantization: bool,
) -> FourBitWeight:
    """Quantize with bitsandbytes, as its `Linear4bit` does when a model is loaded."""
    from bitsandbytes.functional import quantize_4bit

    # The kernels know no float64.
    working = weight.float() if weight.dtype == torch.float64 else weight
    codes, state = quantize_4bit(
        working.contiguous(), blocksize=block_size, compress_statistics=double_quantization, quant_type=quant_type
    )
    return FourBitWeight(codes, state, weight.dtype)


def scales_of(stored: FourBitWeight) -> Float[Tensor, "out_features in_features"]:
    """Return the scale of each weight, float32, as bitsandbytes decodes it."""
    from bitsandbytes.functional import dequantize_blockwise

    state = stored.state
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    rows, columns = stored.shape
    per_weight: Tensor = scales.float().repeat_interleave(state.blocksize)[: rows * columns].view(rows, columns)
    return per_weight


def with_codes(stored: FourBitWeight, codes: Shaped[Tensor, "out_features in_features"]) -> FourBitWeight:
    """Return a weight with the same scales and other codes: two to a byte, the first one in the upper half."""
    flat = codes.flatten().to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, stored.codes.view(-1)[-1:] & 15])  # what fills the last byte stays
    pairs = flat.view(-1, 2)
    return replace(stored, codes=(pairs[:, :1] << 4) | pairs[:, 1:])


def with_scales(stored: FourBitWeight, scales: Float[Tensor, " blocks"]) -> FourBitWeight:
    """Return a weight with the same codes and other scales, stored as bitsandbytes stores its own."""
    from bitsandbytes.functional import QuantState, quantize_blockwise

    # bitsandbytes stores 8-bit scales around their mean: offset, 8-bit codes of the differences, and scales of these.
    state, nested = stored.state, {}
    if state.nested:
        nested["offset"] = scales.mean()
        scales, nested["state2"] = quantize_blockwise(scales - nested["offset"], blocksize=state.state2.blocksize)
    changed = QuantState(scales, state.shape, state.code, state.blocksize, state.quant_type, state.dtype, **nested)
    return replace(stored, state=changed)


def with_least_error(stored: FourBitWeight, weight: Float[Tensor, "out_features in_features"]) -> FourBitWeight:
    """Return a weight with the scale, among `SHARES` of the one that it has, that gives each block the least error.

    Args:
        stored: the weight as bitsandbytes quantizes it.
        weight: the weight itself.
    """
    # A smaller scale clips the largest weights of a block and puts the levels closer together for all others; where the
    # largest weight is an outlier, that is a good trade. Codes and error of a block depend on its own scale alone, so
    # all blocks try one share after the other together, and each keeps its best.
    codebook, size, full = Codebook.of(stored.state.code.to(weight.device)), stored.state.blocksize, weight.float()
    scales = scales_of(stored)
    flat = functional.pad(full.flatten(), (0, -full.numel() % size)).view(-1, size)
    largest = scales.flatten()[::size]
    least, best = torch.full_like(largest, torch.inf), largest
    for share in (1.0, *SHARES):
        levels = ScaledCodebook(codebook, share * largest[:, None])
        error = (flat - levels.decode(levels.encode(flat))).square().sum(1)
        least, best = torch.minimum(error, least), torch.where(error < least, share * largest, best)
    # Scales in 8 bits are not the ones that were chosen. The codes are found again for the scales as they are stored,
    # and the result is compared as a whole.
    candidate = with_scales(stored, best)
    candidate = with_codes(candidate, ScaledCodebook(codebook, scales_of(candidate)).encode(full))
    errors = [(full - weights.dequantize().float()).square().sum() for weights in (candidate, stored)]
    return candidate if errors[0] < errors[1] else stored


@final
@dataclass(frozen=True, eq=False)
class Codebook:
    """The values of codes, which ascend from -1 to 1, and a table to find the nearest one with.

    The table cuts the range into cells of one width, so narrow that the nearest value changes once in each at most. A
    look into it finds the same code as a search among all values, in a fourth of its time on a CPU.

    Attributes:
        values: values of the codes.
        below: how many changes lie below each cell, which is the code at its start.
        change: where the nearest value changes in each cell, or above it.
    """

    values: Float[Tensor, " levels"]
    below: Int[Tensor, " cells"]
    change: Float[Tensor, " cells"]

    @classmethod
    def of(cls, values: Float[Tensor, " levels"]) -> Codebook:
        """Return the codebook of some values, which ascend from -1 to 1."""
        changes = (values[1:] + values[:-1]) / 2  # the nearest value changes in the middle between two neighbours
        count = math.ceil(4 / changes.diff().min().item())  # two cells between two changes
        # Cells begin a little early: a number whose place was rounded up into the next cell has its code there as well.
        starts = torch.arange(count, device=values.device) * (2 / count) - (1 + 0.1 / count)
        below = torch.bucketize(starts, changes, out_int32=True)
        return cls(values, below, functional.pad(changes, (0, 1), value=torch.inf)[below])

    def nearest(self, scaled: Float[Tensor, "*weights"]) -> Int[Tensor, "*weights"]:
        """Return the codes of the nearest values, in 32 bits; the first one for NaN."""
        count = len(self.below)
        cell = ((scaled + 1) * (count / 2)).clamp_(0, count - 1).nan_to_num_(0.0).int().flatten()
        above = scaled > self.change.index_select(0, cell).view_as(scaled)
        return self.below.index_select(0, cell).view_as(scaled) + above

    def decode(self, codes: Int[Tensor, "*weights"]) -> Float[Tensor, "*weights"]:
        """Return the values of codes."""
        return self.values.index_select(0, codes.flatten()).view(codes.shape)


@final
@dataclass(frozen=True, eq=False)
class ScaledCodebook:
    """The values of codes, times a scale for each weight.

    Attributes:
        codebook: the values.
        scale: scale of each weight, in a shape that broadcasts to the weights.
    """

    codebook: Codebook
    scale: Float[Tensor, "*scales"]

    def encode(self, value: Float[Tensor, "*weights"]) -> Float[Tensor, "*weights"]:
        """Return the code of the nearest value, held in float32."""
        # Scales that are themselves quantized can come out as zero, or a little below.
        tiny = torch.finfo(value.dtype).tiny
        scale = torch.where(self.scale.abs() < tiny, tiny, self.scale)
        return self.codebook.nearest(value / scale).to(value.dtype)

    def decode(self, codes: Float[Tensor, "*weights"]) -> Float[Tensor, "*weights"]:
        """Return the values of codes."""
        return self.codebook.decode(codes.int()) * self.scale


def four_bit_config(
    quant_type: Literal["nf4", "fp4"], block_size: int, double_quantization: bool
) -> dict[str, object] | None:
    """Return the arguments of transformers' `BitsAndBytesConfig`, which knows block size 64 only."""
    if block_size != _STOCK_BLOCK_SIZE:
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quantization,
    }
