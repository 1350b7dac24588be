"""Leading eigenvectors of a positive semidefinite matrix: dense, or by randomised block Krylov search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .linalg import near, small_eigh, uniform

Apply = Callable[[Tensor], Tensor]
"""`Y -> M Y` for a symmetric positive semidefinite `M`, in the dtype of `Y`."""

_RATE = math.log(4)  # assumed fall of log(slack) in a round, until two checks have shown the real one


@final
@dataclass(frozen=True, eq=False)
class Subspace:
    """Leading eigenvectors of a symmetric positive semidefinite `M`, and how far from the truth they can be.

    Attributes:
        basis: orthonormal columns, most important first.
        energies: energy of each column, `diag(U^T M U)`, float64, descending; up to rounding, never above the true
            eigenvalue.
        upper: bound from above on each true eigenvalue, float64: the energies themselves after a dense solution.
            After an iteration it is a bound unless some direction orthogonal to those found carries more energy than
            the least of them.
        applications: columns that `M` was applied to; 0 for a dense solution.
    """

    basis: Float[Tensor, "rows rank"]
    energies: Float[Tensor, " rank"]
    upper: Float[Tensor, " rank"]
    applications: int = 0

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.energies)

    @property
    def slack(self) -> float:
        """How much energy the best subspace of this rank may capture beyond this one."""
        return (self.upper.sum() - self.energies.sum()).item()

    def leading(self, rank: int) -> Subspace:
        """Return the subspace of the first `rank` directions alone."""
        return Subspace(self.basis[:, :rank], self.energies[:rank], self.upper[:rank], self.applications)

    def rotated(self, rows: Float[Tensor, "more rows"]) -> Subspace:
        """Return the subspace of `rows M rows^T`, where `rows` has orthonormal columns."""
        return Subspace(rows @ self.basis, self.energies, self.upper, self.applications)


def worth_iterating(side: int, rank: int, *, decaying: bool) -> bool:
    """Return whether iteration should beat a dense eigenproblem of this size.

    Iteration is faster as long as it searches less than half of all directions. How many it needs was measured on the
    errors of quantized models, at the smallest sides that this rule allows: at most `2 * rank + 128` directions where
    the spectrum decays, and one block fewer than `3 * rank + 256` where it is flat.
    """
    return side >= 2 * (2 * rank + 128 if decaying else 3 * rank + 256)


def dense_subspace(moment: Float[Tensor, "rows rows"], rank: int) -> Subspace:
    """Return the leading eigenvectors of a symmetric positive semidefinite matrix by LAPACK, in its dtype."""
    # LAPACK reads one triangle only. Rounding makes the two triangles of a product differ; averaging both makes it
    # symmetric.
    values, vectors = small_eigh((moment + moment.T) / 2)
    energies = values[-rank:].flip(0).clamp(min=0).double()
    return Subspace(vectors[:, -rank:].flip(1), energies, energies)


def left_singular_subspace(matrix: Float[Tensor, "rows columns"], rank: int) -> Subspace:
    """Return the leading left singular vectors of `F`, the eigenvectors of `F F^T`, by way of its shorter side."""
    if matrix.shape[0] <= matrix.shape[1]:
        return dense_subspace(matrix @ matrix.T, rank)
    # With the singular value decomposition F = U S V^T the shorter side gives V and S, and F V = U S. Its columns are
    # orthogonal up to rounding relative to the largest singular value. QR normalises them and makes them orthogonal to
    # machine precision; their order and their span stay the same.
    right = dense_subspace(matrix.T @ matrix, rank)
    return Subspace(torch.linalg.qr(matrix @ right.basis).Q, right.energies, right.upper)


@final
class KrylovSearch:
    """A search for the leading eigenvectors of an operator `M` that is known by its products alone.

    Block Lanczos with full reorthogonalisation and Rayleigh-Ritz on all blocks (Musco and Musco, 2015,
    arXiv 1504.05477). On a flat spectrum, such as that of a quantization error, it needs far fewer products than
    subspace iteration, because no block is thrown away. All blocks are also kept between calls of `find`: if more
    directions or a tighter tolerance are asked for later, the search goes on from where it was.

    Each check of convergence solves a small eigenproblem. These take a large part of the time, and most of it on an
    accelerator, so convergence is not checked after every round. The slack falls by about the same factor in each
    round, and the next check is made when it should have become small enough.

    Directions whose energy is much larger than that of all others do no harm in float32. The rounding errors of a
    product point along them. The basis holds these directions from the first round on, so orthogonalisation against it
    removes the errors.
    """

    def __init__(self, apply: Apply, start: Float[Tensor, "rows block"]) -> None:
        """Prepare a search; `start` are the first columns to search, and each round searches as many."""
        self._apply = apply
        self._basis = start.new_zeros(len(start), 0)
        self._projected = start.new_zeros(0, 0, dtype=torch.float64)
        self._cursor = torch.linalg.qr(start).Q
        self._coupling = start.new_zeros(0, 0)
        self._block = start.shape[1]
        self._draws = 0

    @torch.no_grad()
    def find(self, rank: int, *, tolerance: float, limit: int) -> Subspace | None:
        """Return the `rank` leading eigenvectors.

        Stops when `slack <= tolerance * min(captured energy, energy of the other searched directions)`. The latter is a
        lower bound of the optimal error. Also stops when rounding keeps the slack from falling further.

        Args:
            rank: number of directions.
            tolerance: largest slack that ends the search, as described above.
            limit: number of directions to search at most.

        Returns:
            The subspace, or None if the limit was reached.
        """
        # Three numbers decide when to stop. The slack bounds what is still missing: with the true eigenvalues l_i,
        #
        #     sum_i l_i - captured <= slack,    captured = sum_i t_i over the leading Ritz values t_i <= l_i.
        #
        # The error of the correction is tr(M) - captured >= beyond, the energy of all other directions that were
        # searched. The optimum is sum_(i > r) l_i >= beyond, since every Ritz value is at most the eigenvalue of its
        # place. So slack <= tolerance * beyond makes the error at most (1 + tolerance) times the optimum. This needs no
        # tr(M), which would cost as much as the search.
        #
        # The dtype of the products rounds the captured energy by about `rounding`. A slack below a tenth of that cannot
        # be told from zero, so no less is asked for. Rounding errors of several products add up, and the slack can stop
        # falling above that: the search also ends when a check finds no less than the one before, if that was at most
        # 64 times `rounding`.
        check, slack, rate = max(rank + 2 * self._block, 2 * rank + self._block), math.inf, _RATE
        checked = 0
        while True:
            columns = self._basis.shape[1]
            last = columns + self._block > limit
            if columns >= check or (last and columns >= rank):
                subspace = self._ritz(rank)
                captured = subspace.energies.sum().item()
                beyond = self._projected.trace().item() - captured
                rounding = torch.finfo(self._basis.dtype).eps * captured
                allowed = max(tolerance * min(captured, beyond), 0.1 * rounding)
                before, slack = slack, subspace.slack
                if slack <= allowed or before <= slack <= 64 * rounding:
                    return subspace
                # Krylov methods converge geometrically: log(slack) falls by about `rate` for each block. The next check
                # is made where the rate between the last two checks, extrapolated, brings the slack down to `allowed`.
                if before < math.inf:
                    rate = math.log(before / slack) * self._block / (columns - checked)
                ahead = math.ceil(math.log(slack / allowed) / rate) if rate > 0 and allowed > 0 else 1
                check, checked = columns + ahead * self._block, columns
            if last:
                return None
            self._grow()

    def _grow(self) -> None:
        """Search one more block: append the cursor to the basis, and make the next cursor from its product with `M`."""
        # One step of block Lanczos. With orthonormal blocks Q_1 ... Q_j the products fulfil
        #
        #     M Q_j = Q_(j-1) B_(j-1)^T + Q_j A_j + Q_(j+1) B_j
        #
        # and the overlaps with older blocks are zero in exact arithmetic. Rounding makes them grow as soon as a Ritz
        # value has converged, and the search would then find that direction again. So all overlaps Q^T M Q_j are
        # computed and taken off. They are also the last columns of Q^T M Q, whose eigenvalues are the Ritz values.
        # What remains is Q_(j+1) B_j: the next block, and the coupling to it, from which `_ritz` knows the residuals.
        image = self._apply(self._cursor)
        self._basis = torch.cat([self._basis, self._cursor], 1)
        overlap = self._basis.T @ image
        self._projected = _bordered(self._projected, overlap.double())
        cursor, self._coupling = torch.linalg.qr(image - self._basis @ overlap)
        self._cursor = self._fresh(cursor)

    def _fresh(self, cursor: Float[Tensor, "rows block"]) -> Float[Tensor, "rows block"]:
        """Orthonormalise unit columns against the basis; those with nothing new in them become random directions."""
        # A second pass of Gram-Schmidt makes the block orthogonal to machine precision ("twice is enough"). A unit
        # column that loses more than half of its norm consisted of rounding errors: the Krylov space has nothing new
        # in this direction. A random direction in its place keeps the search from missing eigenvectors that are
        # orthogonal to the start. Its coupling is zero up to rounding, as the residual bound needs it.
        cursor = cursor - self._basis @ (self._basis.T @ cursor)
        spent = cursor.norm(dim=0) < 0.5
        if spent.any():
            self._draws += 1
            cursor = torch.where(spent, uniform(cursor.shape, cursor, seed=self._draws), cursor)
            cursor = cursor - self._basis @ (self._basis.T @ cursor)
        orthonormal: Tensor = torch.linalg.qr(cursor).Q
        return orthonormal

    def _ritz(self, rank: int) -> Subspace:
        """Take the leading directions of the searched space, and bound the true eigenvalues from above.

        The bound holds unless a direction orthogonal to those found has more energy than the least one found.
        """
        # Why `upper` is a bound. Let V be the leading Ritz vectors and T the diagonal matrix of their energies. With
        # the next block Q', M V = V T + Q' R. The residual is Q' R with R = B S, where B is the coupling to the next
        # block and S are the last rows of the coefficients of V. In the basis of V and its complement, in which R has
        # entries for Q' alone,
        #
        #     M = [[T, R^T], [R, D]].
        #
        # If no direction of the complement has more energy than the least Ritz value t_r, then D <= t_r I, so that
        #
        #     M <= [[T, R^T], [R, t_r I]]
        #
        # and by Weyl's monotonicity each eigenvalue of the right side is at least that of M. Outside of V and Q' the
        # right side is t_r I alone, so that its leading eigenvalues are those of a small matrix with one row for each
        # Ritz vector and each column of Q'. From below, t_i <= l_i holds for all Rayleigh-Ritz values (Cauchy).
        values, vectors = torch.linalg.eigh(near(self._projected))
        leading = vectors[:, -rank:].flip(1)
        energies = values[-rank:].flip(0).clamp(min=0)
        residual = self._coupling.to(leading) @ leading[-self._block :]
        corner = energies[-1].expand(self._block).diag()
        enclosing = _bordered(energies.diag(), torch.cat([residual.T, corner]))
        upper = torch.linalg.eigvalsh(enclosing).flip(0)[:rank]
        basis = self._basis @ leading.to(self._basis)
        upper, energies = (numbers.to(basis.device) for numbers in (torch.maximum(upper, energies), energies))
        return Subspace(basis, energies, upper, self._basis.shape[1])


def _bordered(inner: Float[Tensor, "known known"], last: Float[Tensor, "all columns"]) -> Float[Tensor, "all all"]:
    """Return the symmetric matrix with this leading block and these last columns."""
    known = len(inner)
    whole = last.new_zeros(len(last), len(last))
    whole[:known, :known] = inner
    whole[:, known:] = last
    whole[known:, :known] = last[:known].T
    return whole
