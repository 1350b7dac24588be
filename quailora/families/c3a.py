"""C3A: a correction of circulant blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from typing_extensions import override

from ..core.linalg import semidefinite_solve
from ..core.objective import Objective
from ..errors import ConfigurationError, TargetError
from .adapter import Change, Parameters
from .base import Family
from .linear import dense_metric


@final
@dataclass(frozen=True)
class C3A(Family):
    """`C` of circulant blocks, whose first rows are `c3a_kernel / in_features` (Chen et al., 2024, arXiv 2407.19342).

    A row of blocks is a circular correlation of the inputs, which the Fourier transform of each block of inputs makes a
    product. So the equations of the best kernels separate by frequencies, into as many unknowns as a row has blocks.
    PEFT's own start is random; the one here that changes nothing is zero.

    Attributes:
        block_size: side of the blocks, which has to divide both sides of every layer.
    """

    name: ClassVar[str] = "c3a"
    peft_type: ClassVar[str] = "C3A"
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    block_size: int = 256

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigurationError(f"Expected a block_size of at least 1, got {self.block_size}.")

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        if any(side % self.block_size for side in shape):
            raise TargetError(
                f"Expected a block_size that divides both sides of a layer of shape {shape} for c3a, got "
                f"{self.block_size}."
            )
        return {"c3a_kernel": (shape[0] // self.block_size, shape[1] // self.block_size, self.block_size)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        # Block (i, j) of in_features C is sum_t w_ij[t] S^t, with the shifts S^t that have ones at (k, k + t). The
        # error is least where (E - C) H has no part along any shift in any block. With the sums D of blocks along
        # their circular diagonals that is
        #
        #     D(E H)_ij[t] = sum_l sum_u w_il[u] D(H)_lj[t - u].
        #
        # This is a convolution in t: its Fourier transform is one system of equations for each frequency.
        error = objective.error.double()
        right = self._spectrum(objective.metric.product(error))
        matrix = self._spectrum(dense_metric(objective.metric, error))
        found = semidefinite_solve(matrix.permute(2, 1, 0), right.permute(2, 1, 0)).permute(2, 1, 0)
        return {"c3a_kernel": error.shape[1] * torch.fft.irfft(found, n=self.block_size)}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        kernel = parameters["c3a_kernel"]
        rows, columns, size = kernel.shape
        place = torch.arange(size, device=kernel.device)
        blocks = kernel[:, :, (place - place[:, None]) % size] / (columns * size)  # PEFT divides by in_features
        return Change(blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size))

    @override
    def resized(self, shapes: Sequence[tuple[int, int]], numbers: int) -> C3A:
        # A layer has rows * columns / block_size numbers, for a block size that divides its sides.
        whole = math.gcd(*(side for shape in shapes for side in shape))
        every = sum(rows * columns for rows, columns in shapes)
        sizes = [size for size in range(1, whole + 1) if whole % size == 0 and every <= size * numbers]
        return replace(self, block_size=min(sizes, default=whole))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"block_size": self.block_size, "init_weights": True}

    def _spectrum(
        self, matrix: Float[Tensor, "rows columns"]
    ) -> Complex[Tensor, "row_blocks column_blocks frequencies"]:
        """Return the Fourier transform of the sums of each block along its circular diagonals."""
        size = self.block_size
        place = torch.arange(size, device=matrix.device)
        blocks = matrix.reshape(len(matrix) // size, size, matrix.shape[1] // size, size)
        diagonals = blocks.transpose(1, 2)[:, :, place[:, None], (place + place[:, None]) % size].sum(2)
        spectrum: Tensor = torch.fft.rfft(diagonals)
        return spectrum
