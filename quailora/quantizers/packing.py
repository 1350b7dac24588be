"""Integer codes of any width from 1 to 8 bits, packed without gaps into bytes."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " packed"]:
    """Pack codes below `2**bits`, lowest bit first, row-major, into `ceil(numel * bits / 8)` bytes.

    Eight codes at a time: they fill the lowest `bits` bytes of one little-endian 64-bit word.
    """
    # Eight codes of b bits take 8 b bits, which are b whole bytes: the unit in which any width can be packed without
    # gaps.
    count = codes.numel()
    eights = functional.pad(codes.flatten(), (0, -count % 8)).view(-1, 8)
    words = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for position in range(8):
        words |= eights[:, position].long() << bits * position
    return words.view(torch.uint8).view(-1, 8)[:, :bits].flatten()[: -(-count * bits // 8)].contiguous()


def unpack(packed: UInt8[Tensor, " packed"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """Undo `pack`."""
    count = torch.Size(shape).numel()
    rows = functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words = functional.pad(rows, (0, 8 - bits)).view(torch.int64)
    codes = torch.empty(len(words), 8, dtype=torch.uint8, device=packed.device)
    for position in range(8):
        codes[:, position] = (words[:, 0] >> bits * position) & (2**bits - 1)
    return codes.flatten()[:count].view(shape)


def pack_words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """Pack codes as `pack` does, into 32-bit words; each row has to fill whole ones."""
    return pack(codes, bits).view(torch.int32).view(len(codes), -1)


def unpack_words(words: Int[Tensor, "rows words"], bits: int) -> UInt8[Tensor, "rows columns"]:
    """Undo `pack_words`."""
    rows, width = words.shape
    return unpack(words.contiguous().view(torch.uint8).flatten(), bits, (rows, width * 32 // bits))
