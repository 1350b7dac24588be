"""Dense linear algebra that the other modules share."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..errors import NumericalError, NumericalWarning

_BLOCKS = 8  # blocks of a symmetric form: 9/16 of the work of a general product
_PRODUCT_BLOCKS, _LEAST_BLOCK = 4, 192  # blocks of a symmetric product: 5/8 of the work of a general one
_RIDGE = 1e-10  # of the diagonal of normal equations: above the rounding errors of float64
_ROWS = 512  # rows that are converted to float64 at a time
_SMALL = 1024  # sides up to which a decomposition is faster on the processor than on an accelerator


def small_eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix, on its own device.

    A small matrix is decomposed on the processor: an accelerator takes many times longer for its many short steps.
    """
    values, vectors = torch.linalg.eigh(near(matrix))
    return values.to(matrix.device), vectors.to(matrix.device)


def near(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return a matrix on the processor if it is small, else where it is."""
    return matrix.cpu() if max(matrix.shape) <= _SMALL else matrix


def uniform(shape: tuple[int, ...], like: Tensor, seed: int | None = None) -> Tensor:
    """Return numbers drawn evenly from -1 to 1, in the dtype and on the device of another tensor.

    They are drawn on the processor. Unlike torch's normal numbers, and those of other devices, they are the same on
    every machine.

    Args:
        shape: shape of the result.
        like: the tensor whose dtype and device the result has.
        seed: seed of a generator of their own; torch's global generator is used if it is missing.
    """
    # Uniform numbers are a shift and a product of random bits. Normal ones are computed by vector units, whose results
    # differ from processor to processor in their last digits.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=like.dtype).uniform_(-1, 1, generator=generator).to(like.device)


def product_svd(
    lora_B: Float[Tensor, "out_features rank"], lora_A: Float[Tensor, "rank in_features"]
) -> tuple[Float[Tensor, "out_features rank"], Float[Tensor, " rank"], Float[Tensor, "rank in_features"]]:
    """Return the singular value decomposition `(U, s, Vh)` of `lora_B @ lora_A` without forming the product.

    Equivalent to `torch.linalg.svd(lora_B @ lora_A, full_matrices=False)` cut to `rank`, in `O((m + n) r^2)`.

    Args:
        lora_B: left factor.
        lora_A: right factor.

    Returns:
        Left singular vectors, singular values in descending order, right singular vectors.
    """
    # B = Q1 R1 and A^T = Q2 R2 give B A = Q1 (R1 R2^T) Q2^T. The matrix in the middle is r x r, and orthonormal factors
    # around its decomposition U S V^T leave the singular values as they are: B A = (Q1 U) S (Q2 V)^T.
    left, left_r = torch.linalg.qr(lora_B)
    right, right_r = torch.linalg.qr(lora_A.T)
    u, s, vh = (part.to(left.device) for part in torch.linalg.svd(near(left_r @ right_r.T)))
    return left @ u, s, vh @ right.T


def safe_cholesky(matrix: Float[Tensor, "n n"], max_tries: int = 10) -> Float[Tensor, "n n"]:
    """Return the lower Cholesky factor of a positive semidefinite matrix, repaired if rounding made it indefinite.

    Jitter starts at the rounding error of the largest diagonal entry and grows tenfold a try, far enough for a float64
    matrix whose sums were rounded to float32.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        max_tries: how many jitters to try.

    Returns:
        `L` with `L L^T = matrix + jitter * I`.

    Raises:
        NumericalError: if the matrix has NaN or infinite entries, or stays indefinite after the largest jitter.
    """
    factor, jitter = repaired_cholesky(matrix, max_tries)
    if jitter:
        message = f"A Gram matrix was indefinite by rounding; added {jitter:.3g} to its diagonal."
        warnings.warn(message, NumericalWarning, stacklevel=2)
    return factor


def repaired_cholesky(matrix: Float[Tensor, "n n"], max_tries: int = 10) -> tuple[Float[Tensor, "n n"], float]:
    """Return the factor of `safe_cholesky` without its warning, and the jitter that was added."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return factor, 0.0
    # A sum over n products is off by up to n machine epsilons of the largest entry, so this is the size that a negative
    # eigenvalue can have by rounding alone. More is tried since the sums may have been made in a shorter dtype.
    scale = matrix.diagonal().max().item() * torch.finfo(matrix.dtype).eps * len(matrix)
    for attempt in range(max_tries):
        jitter = scale * 10**attempt
        repaired = matrix.clone()
        repaired.diagonal().add_(jitter)
        factor, info = torch.linalg.cholesky_ex(repaired)
        if not info:
            return factor, jitter
    raise NumericalError(
        f"Expected a positive semidefinite matrix, but Cholesky failed even after adding {jitter:.3g} to the diagonal. "
        "Check that the calibration inputs are finite, or raise the damping."
    )


def semidefinite_solve(
    matrices: Shaped[Tensor, "*batch n n"], right: Shaped[Tensor, "*batch n k"], ridge: float = _RIDGE
) -> Shaped[Tensor, "*batch n k"]:
    """Return `X` with `matrices @ X = right`, for normal equations in float64 or complex128, which may be singular.

    Args:
        matrices: symmetric or Hermitian, positive semidefinite up to rounding.
        right: right-hand sides in the range of the matrices.
        ridge: share of the diagonal that is added to it; more where that is not enough.

    Raises:
        NumericalError: if a matrix is not finite, or far from semidefinite.
    """
    roots, factors = scaled_cholesky(matrices, ridge)
    return torch.cholesky_solve(right * roots[..., None], factors) * roots[..., None]


def scaled_cholesky(
    matrices: Shaped[Tensor, "*batch n n"], ridge: float = _RIDGE
) -> tuple[Float[Tensor, "*batch n"], Shaped[Tensor, "*batch n n"]]:
    """Return the inverse root `d` of each diagonal, and Cholesky factors of `diag(d) M diag(d)`.

    A ridge makes up for singular matrices; see `semidefinite_solve`, which has the arguments and the errors.
    """
    # With a diagonal of ones a ridge is small against every direction, however loud single inputs are. Where the
    # diagonal is zero, so are the row and the right-hand side, and the solution stays zero.
    powers = matrices.diagonal(dim1=-2, dim2=-1).real
    roots = torch.where(powers > 0, powers, torch.inf).rsqrt()
    scaled = matrices * roots[..., None] * roots[..., None, :]
    while ridge < 1:
        factors, info = torch.linalg.cholesky_ex(scaled + ridge * torch.eye(scaled.shape[-1]).to(scaled))
        if not info.any():
            return roots, factors
        ridge *= 10  # the sums of the statistics may have been made in float32
    raise NumericalError("Expected normal equations that are positive semidefinite. Check that the inputs are finite.")


def triangular_inverse(lower: Float[Tensor, "n n"], block: int = 256) -> Float[Tensor, "n n"]:
    """Return the inverse of a lower triangular matrix, block row by block row.

    A third of the work of `torch.linalg.solve_triangular` with an identity, and most of it in matrix products.

    Args:
        lower: lower triangular, with no zero on the diagonal.
        block: how many rows are inverted at a time.
    """
    # [[P, 0], [R, S]]^-1 = [[P^-1, 0], [-S^-1 R P^-1, S^-1]], with P what is inverted already and S the next block.
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), block):
        stop = min(start + block, len(lower))
        corner = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[start:stop, start:stop], corner, upper=False)
        inverse[start:stop, start:stop] = corner
        inverse[start:stop, :start] = -corner @ (lower[start:stop, :start] @ inverse[:start, :start])
    return inverse


def same_device(tensor: Tensor, device: torch.device | str) -> bool:
    """Return whether a tensor is on a device; one without a number is the current one of its kind."""
    return tensor.device == torch.empty(0, device=device).device


def squared_norm(matrix: Float[Tensor, "rows columns"]) -> float:
    """Return the squared Frobenius norm, summed in float64."""
    return matrix.double().square().sum().item()


def symmetric_form(matrix: Float[Tensor, "rows columns"], symmetric: Float[Tensor, "columns columns"]) -> float:
    """Return `tr(M S M^T)`, with products in the dtype of `M` and sums in float64.

    `S` is symmetric, so only its blocks up to the diagonal are multiplied, and those off it count twice.
    """
    # tr(M S M^T) = sum over blocks i, j of <M_i S_ij, M_j>. The pairs (i, j) and (j, i) are equal by symmetry, so that
    # in each block column the blocks above the diagonal count twice, and the one on the diagonal once: twice its half.
    columns = matrix.shape[1]
    size = -(-columns // _BLOCKS)
    total = 0.0
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        here = matrix[:, start:stop]
        half = matrix[:, :start] @ symmetric[:start, start:stop]
        half.add_(here @ symmetric[start:stop, start:stop], alpha=0.5)
        total += 2 * (half.mul_(here)).sum(dtype=torch.float64).item()
    return not_negative(total)


def not_negative(value: float) -> float:
    """Return a sum that is below zero by rounding only, or zero in its place. NaN stays NaN."""
    return 0.0 if value < 0 else value


def blend(mean: Tensor, more: Tensor, share: float, weight: float) -> None:
    """Replace a float64 mean by `(1 - share) mean + weight more`, in place, from any dtype and device.

    By rows, since adding float32 to float64 makes a copy first.
    """
    mean.mul_(1 - share)
    for rows, others in zip(torch.split(mean, _ROWS), torch.split(more, _ROWS), strict=True):
        rows.add_(others.to(rows.device), alpha=weight)


def self_product(matrix: Float[Tensor, "tokens in_features"]) -> Float[Tensor, "in_features in_features"]:
    """Return `X^T X` in the dtype of `X`, exactly symmetric.

    Only blocks up to the diagonal are multiplied; the others are mirrored. Products with `out` are not autocast, so a
    model that computes in bfloat16 around this one does not round them.
    """
    # Block column by block column: four blocks to a side make ten products of sixteen, which is 5/8 of the work. Narrow
    # inputs have fewer blocks, since small products do not fill a processor.
    columns = matrix.shape[1]
    product = matrix.new_empty(columns, columns)
    size = max(_LEAST_BLOCK, -(-columns // _PRODUCT_BLOCKS))
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        torch.mm(matrix[:, start:stop].T, matrix[:, :stop], out=product[start:stop, :stop])
        product[:start, start:stop] = product[start:stop, :start].T
        diagonal = product[start:stop, start:stop]
        diagonal.copy_((diagonal + diagonal.T) / 2)  # the sums of its two halves were rounded in different orders
    return product
