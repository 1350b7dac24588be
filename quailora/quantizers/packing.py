"""Integer codes of any width from 1 to 8 bits, packed without gaps into bytes."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " packed"]:
    """Pack codes below `2**bits`, lowest bit first, row-major, into `ceil(numel * bits / 8)` bytes."""
    planes = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = (codes.reshape(-1, 1) >> planes & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, " packed"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """Undo `pack`."""
    stream = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).flatten()
    stream = stream[: bits * torch.Size(shape).numel()].view(-1, bits)
    planes = torch.arange(bits, device=packed.device, dtype=torch.uint8)
    return (stream << planes).sum(1, dtype=torch.uint8).view(shape)
