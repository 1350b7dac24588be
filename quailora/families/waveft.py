"""WaveFT: a correction with few entries in its wavelet transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from ..core.metrics import Identity
from ..core.objective import Objective
from .adapter import Change, Parameters
from .base import Family
from .linear import block_inverse, dense_metric, least_squares
from .regression import base_of
from .spectrum import check_room, check_spectrum, drawn_places, equal_share

_ROOT = 0.5**0.5


@final
@dataclass(frozen=True)
class WaveFT(Family):
    """`C = scaling * idwt2(S)`, with the trained entries of a sparse `S` (Bilican et al., 2025, arXiv 2505.12532).

    The transform is one level of Haar's wavelets, PEFT's `db1`, which pairs neighboring rows and columns. PEFT draws
    the places of the entries from the seed and from the shape of the layer, and does not store them.

    Attributes:
        n_frequency: how many entries are trained in each layer.
        scaling: PEFT's factor.
        random_loc_seed: the seed of the places.
        use_idwt: whether there is a transform; `C = scaling * S` without one.
    """

    name: ClassVar[str] = "waveft"
    peft_type: ClassVar[str] = "WAVEFT"
    runs_empty: ClassVar[bool] = False
    stationary: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    n_frequency: int = 2592
    scaling: float = 25.0
    random_loc_seed: int = 777
    use_idwt: bool = True

    def __post_init__(self) -> None:
        check_spectrum(self.n_frequency, self.scaling, self.random_loc_seed)

    @override
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        check_room(self, self.n_frequency, shape)
        return {"waveft_spectrum": (self.n_frequency,)}

    @override
    def solve(self, objective: Objective, rank: int) -> Parameters:
        shape = (objective.error.shape[0], objective.error.shape[1])
        row, column = self._places(shape, objective.error)

        def adjoint(matrix: Tensor) -> Tensor:
            transform = haar(matrix) if self.use_idwt else matrix
            return self.scaling * transform[row, column]

        # Without calibration the equations are those of waves that are orthogonal: there is nothing to precondition.
        inverse = None if isinstance(objective.metric, Identity) else self._inverse(objective, row, column)
        found = least_squares(objective, lambda spectrum: self._correction(spectrum, shape), adjoint, inverse)
        return {"waveft_spectrum": found}

    @override
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        rows, columns = base_of(self, base).shape
        return Change(self._correction(parameters["waveft_spectrum"], (rows, columns)))

    @override
    def resized(self, shapes: Sequence[tuple[int, int]], numbers: int) -> WaveFT:
        return replace(self, n_frequency=equal_share(shapes, numbers))

    @override
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "n_frequency": self.n_frequency,
            "scaling": self.scaling,
            "random_loc_seed": self.random_loc_seed,
            "use_idwt": self.use_idwt,
            "wavelet_family": "db1",
            "init_weights": True,
        }

    def _correction(
        self, spectrum: Float[Tensor, " n_frequency"], shape: tuple[int, int]
    ) -> Float[Tensor, "out_features in_features"]:
        row, column = self._places(shape, spectrum)
        rows, columns = (side + side % 2 for side in shape) if self.use_idwt else shape
        dense = spectrum.new_zeros(rows, columns).index_put((row, column), spectrum)
        return self.scaling * (inverse_haar(dense)[: shape[0], : shape[1]] if self.use_idwt else dense)

    def _inverse(
        self, objective: Objective, row: Int[Tensor, " n_frequency"], column: Int[Tensor, " n_frequency"]
    ) -> Callable[[Tensor], Tensor]:
        """Return the inverse of the equations' matrix, which has one block for each row of the transform."""
        # Outputs are orthogonal, and so are the sum and the difference of two. Only the last of an odd number has no
        # partner: its sum and its difference are the same, and half as large.
        last = len(objective.error) // 2
        single = (row % (last + 1) == last) & bool(self.use_idwt and len(objective.error) % 2)
        share = 1 - single.double() / 2
        metric = dense_metric(objective.metric, objective.error)
        metric = self.scaling**2 * (haar(metric) if self.use_idwt else metric)

        def blocks(table: Tensor) -> Tensor:
            return share[table[:, :1, None]] * metric[column[table][:, :, None], column[table][:, None]]

        return block_inverse(torch.where(single, last, row), blocks)

    def _places(self, shape: tuple[int, int], like: Tensor) -> Int[Tensor, "2 n_frequency"]:
        """Return the row and column of each entry in the transform, on the device of a tensor."""
        places = drawn_places(shape, self.n_frequency, self.random_loc_seed).to(like.device)
        if not self.use_idwt:
            return places
        # PEFT's quarter at the upper right holds differences of rows, and the one at the lower left those of columns,
        # so that both change places here. A layer with an odd side has a row or column added to it.
        (row, column), (rows, columns) = places, ((side + 1) // 2 for side in shape)
        return torch.stack([row % rows + (column >= columns) * rows, column % columns + (row >= rows) * columns])


def haar(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "even_rows even_columns"]:
    """Return one level of Haar's wavelet transform: sums of neighbors before their differences, both over root 2.

    Of a matrix with an odd side, which counts as if a zero followed.
    """
    matrix = pad(matrix, (0, matrix.shape[1] % 2, 0, matrix.shape[0] % 2))
    for _ in range(2):  # along the rows, then along the columns
        first, second = matrix[::2], matrix[1::2]
        matrix = (_ROOT * torch.cat([first + second, first - second])).T
    return matrix


def inverse_haar(transform: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return the matrix that `haar` makes a transform of; both sides have to be even."""
    for _ in range(2):
        sums, differences = transform.chunk(2)
        transform = (_ROOT * torch.stack([sums + differences, sums - differences], 1).flatten(0, 1)).T
    return transform
