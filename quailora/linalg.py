"""Dense linear algebra that every other module shares. Imports torch and nothing of quailora but its errors."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import NumericalError, NumericalWarning


def leading_subspace(
    error: Float[Tensor, "out_features in_features"],
    product: Float[Tensor, "out_features in_features"],
    rank: int,
) -> Float[Tensor, "out_features rank"]:
    """Return an orthonormal basis `U` of the `rank` leading eigenvectors of `E H E^T`.

    `U U^T E` is then the best rank-`rank` approximation of `E` in the metric `H` (Eckart-Young for `E L`, where
    `L L^T = H`). Neither a square root nor an inverse of `H` is needed, so `H` may be singular. A tall `E` is first
    reduced to the range of `E` by a thin QR, so the eigenproblem has the size of the shorter side.

    Args:
        error: `E`, in float64.
        product: `E H`, in float64.
        rank: number of directions, at most `min(out_features, in_features)`.

    Returns:
        The basis, most important direction first.
    """
    tall = error.shape[0] > error.shape[1]
    if tall:
        basis, error = torch.linalg.qr(error)
        product = basis.T @ product
    moment = product @ error.T
    vectors: Tensor = torch.linalg.eigh((moment + moment.T) / 2).eigenvectors
    leading = vectors[:, -rank:].flip(1)
    return basis @ leading if tall else leading


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
    left, left_r = torch.linalg.qr(lora_B)
    right, right_r = torch.linalg.qr(lora_A.T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    return left @ u, s, vh @ right.T


def safe_cholesky(matrix: Float[Tensor, "n n"], max_tries: int = 6) -> Float[Tensor, "n n"]:
    """Return the lower Cholesky factor of a positive semidefinite matrix, repaired if rounding made it indefinite.

    Jitter starts at the rounding error of the largest diagonal entry and grows tenfold a try.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        max_tries: how many jitters to try.

    Returns:
        `L` with `L L^T = matrix + jitter * I`.

    Raises:
        NumericalError: if the matrix has NaN or infinite entries, or stays indefinite after the largest jitter.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return factor
    scale = matrix.diagonal().max().item() * torch.finfo(matrix.dtype).eps * len(matrix)
    for attempt in range(max_tries):
        jitter = scale * 10**attempt
        repaired = matrix.clone()
        repaired.diagonal().add_(jitter)
        factor, info = torch.linalg.cholesky_ex(repaired)
        if not info:
            message = f"A Gram matrix was indefinite by rounding; added {jitter:.3g} to its diagonal."
            warnings.warn(message, NumericalWarning, stacklevel=2)
            return factor
    raise NumericalError(
        f"Expected a positive semidefinite matrix, but Cholesky failed even after adding {jitter:.3g} to the diagonal. "
        "Check that the calibration inputs are finite, or raise the damping."
    )
