"""FourierFT: a correction with few entries in its Fourier transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from ..core.metrics import Identity
from ..core.objective import Objective
from .adapter import Change, Parameters
from .base import Family
from .linear import block_inverse, dense_metric, least_squares
from .regression import base_of
from .spectrum import check_room, check_spectrum, drawn_places, equal_share


@final
@dataclass(frozen=True)
class FourierFT(Family):
    """`C = scaling * Re(ifft2(S))`, with the trained entries of a sparse `S` (Gao et al., 2024, arXiv 2405.03003).

    PEFT draws their places from the seed and from the shape of the layer, and does not store them. Its own start is
    random and changes the output of the model; the one here that changes nothing is zero. The entries are real, so that
    `C` is a sum of cosines: they can make half of all matrices, those that stay the same if both axes are turned round.

    Attributes:
        n_frequency: how many entries are trained in each layer.
        scaling: PEFT's factor.
        random_loc_seed: the seed of the places.
    """

    name: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777

    def __post_init__(self) -> None:
        check_spectrum(self.n_frequency, self.scaling, self.random_loc_seed)

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_room(self, self.n_frequency, shape)
        return {"fourierft_spectrum": (self.n_frequency,)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        shape = (objective.error.shape[0], objective.error.shape[1])
        places = drawn_places(shape, self.n_frequency, self.random_loc_seed).to(objective.error.device)

        def adjoint(matrix: Tensor) -> Tensor:
            # <M, Re(ifft2(S))> = <Re(fft2(M)), S> / (m n) for real S: up to m n the inverse transform is the adjoint.
            waves: Tensor = torch.fft.fft2(matrix).real
            return self.scaling / matrix.numel() * waves[places[0], places[1]]

        # Without calibration the equations are those of waves that are orthogonal, or equal: nothing to precondition.
        inverse = None if isinstance(objective.metric, Identity) else self._inverse(objective, places)
        found = least_squares(objective, lambda spectrum: self._correction(spectrum, shape), adjoint, inverse)
        return {"fourierft_spectrum": found}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        rows, columns = base_of(self, base).shape
        return Change(self._correction(parameters["fourierft_spectrum"], (rows, columns)))

    @override
    def resized(self, shapes: Sequence[tuple[int, int]], numbers: int) -> FourierFT:
        return replace(self, n_frequency=equal_share(shapes, numbers))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "n_frequency": self.n_frequency,
            "scaling": self.scaling,
            "random_loc_seed": self.random_loc_seed,
            "init_weights": True,
        }

    def _correction(
        self, spectrum: Float[Tensor, " n_frequency"], shape: tuple[int, int]
    ) -> Float[Tensor, "out_features in_features"]:
        row, column = drawn_places(shape, self.n_frequency, self.random_loc_seed).to(spectrum.device)
        dense = spectrum.new_zeros(shape).index_put((row, column), spectrum)
        weight: Tensor = torch.fft.ifft2(dense).real
        return self.scaling * weight

    def _inverse(self, objective: Objective, places: Int[Tensor, "2 n_frequency"]) -> Callable[[Tensor], Tensor]:
        """Return the inverse of the equations' matrix, which has one block for each frequency along the outputs."""
        # The entry (p, q) adds the wave Re(u_p f_q^T) to C, with u_p[k] = exp(2 pi i p k / m) and f_q likewise. That of
        # (-p, -q) is the same, so p is taken from 0 to m / 2. Waves of different p are orthogonal in any metric, and
        #
        #     tr(Re(u_p f_a^T) H Re(u_p f_b^T)^T) = m / 2 Re(f_a^* H f_b)    unless u_p is real, with another
        #                                         + m / 2 Re(f_a^* H f_-b)   if it is.
        #
        # fft2(H) holds f_a^* H f_-b at (a, b). Its real part is the same at (-a, -b), so that a half of it is enough.
        m, n = objective.error.shape
        half: Tensor = torch.fft.rfft2(dense_metric(objective.metric, objective.error)).real
        turned = 2 * places[0] > m
        row = torch.where(turned, m - places[0], places[0])
        column = torch.where(turned, -places[1], places[1]) % n
        alone = 2 * row % m == 0

        def at(first: Tensor, second: Tensor) -> Tensor:
            mirrored = second > n // 2
            return half[torch.where(mirrored, -first, first) % n, torch.where(mirrored, n - second, second)]

        def blocks(table: Tensor) -> Tensor:
            waves, real = column[table], alone[table[:, 0]]
            found = at(waves[:, :, None], -waves[:, None] % n)
            found[real] += at(waves[real][:, :, None], waves[real][:, None])
            return found * (self.scaling**2 / (2 * m * n**2))

        return block_inverse(row, blocks)
