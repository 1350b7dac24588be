"""Problems of the sizes of real layers, and the routes that other methods take to solve them."""

from __future__ import annotations

import torch

from quailora import NF4, InputStatistics

SHAPES = [(576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (4096, 14336)]
RANKS = [16, 64, 256]


def quantization_error(shape, seed=0):
    """Return the NF4 error of a Gaussian weight: a flat spectrum, like that of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(shape, generator=generator)
    return weight - NF4().quantize(weight).dequantize()


def realistic_second_moment(width, seed=0):
    """Return a Gram that decays like those of SmolLM2: the i-th eigenvalue about 1/i, channels of unequal loudness.

    Measured there, as a share of the trace: 0.05 to 0.7 for the first, then 1e-2 at 10, 1e-3 at 100; the loudest
    channel 50 to 2000 times the median.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = min(width, 1024)
    basis = torch.randn(width, leading, generator=generator) / width**0.5
    moment = (basis / torch.arange(1, leading + 1)) @ basis.T
    moment.diagonal().add_(0.5 / width)
    loudness = (0.7 * torch.randn(width, generator=generator)).exp()
    return (moment * loudness[:, None] * loudness).double()


def statistics_of(second_moment, tokens=16384):
    """Return statistics with a given second moment."""
    width = len(second_moment)
    statistics = InputStatistics(width)
    statistics.add(second_moment * tokens, tokens)
    return statistics


def full_svd(error, rank):
    """One step of LoftQ: a full singular value decomposition of the error, cut."""
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank], s


def exact_route(error, second_moment, rank):
    """QERA-exact and EoRA: a root of the Gram from its eigendecomposition in float64, then a full SVD in float32."""
    values, vectors = torch.linalg.eigh(second_moment)
    values = values.clamp(min=values[-1] * 1e-12)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd(error @ root.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank] @ inverse.float(), s


def products(shape, columns, rank):
    """Return the floating-point operations of a search of some columns and of what follows it.

    Products of each column with `E`, `H` and `E^T`, two passes of orthogonalisation and the projections, the basis,
    `lora_A`, and the two thin products that measure the error.
    """
    m, n = shape
    search = columns * (4 * m * n + 2 * n * n) + 4 * m * columns**2
    return search + 2 * m * columns * rank + 4 * m * n * rank + 2 * n * n * rank
