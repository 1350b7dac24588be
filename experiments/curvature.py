"""Largest eigenvalue of the Hessian of the training loss in the trained factors, before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .arms import ARMS
from .protocol import Run
from .runs import Bench
from .training import model_of
from .ways import split

_WINDOWS = 4
_VECTORS, _RESTARTS, _TOLERANCE = 8, 8, 0.02


def curvature_of(bench: Bench, run: Run) -> float:
    """Return the largest eigenvalue at the start of a run, over the first training windows.

    Args:
        bench: where starts are.
        run: arm, rank and seed of the start; the rate is without meaning.
    """
    model = model_of(run, ARMS[run.arm], bench.start(run), bench.protocol)
    windows = bench.data().windows
    split(model, ARMS[run.arm], windows)
    model.get_base_model().set_attn_implementation("eager")  # other kernels cannot be differentiated twice
    return top_eigenvalue(model, windows[:_WINDOWS].to(model.device))


def top_eigenvalue(model: Any, windows: Tensor) -> float:
    """Return the largest eigenvalue of the Hessian by Lanczos (SciPy's ARPACK), over products with the Hessian.

    Products are exact, by differentiating the gradient along a vector (Pearlmutter, 1994), in float32.

    Args:
        model: a `PeftModel` whose trained parameters require gradients, which can be differentiated twice.
        windows: token ids, (batch, tokens), over which the loss is the mean.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    loss = model(input_ids=windows, labels=windows, use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        whole = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).ravel())
        parts = whole.to(windows.device).split(sizes)
        directions = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        products = torch.autograd.grad(gradients, parameters, directions, retain_graph=True)
        return torch.cat([part.flatten() for part in products]).cpu().numpy()

    size = sum(sizes)
    begin = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    values = eigsh(
        LinearOperator((size, size), matvec=product, dtype=np.float32),
        k=1,
        which="LA",
        v0=begin,
        ncv=_VECTORS,
        maxiter=_RESTARTS,
        tol=_TOLERANCE,
        return_eigenvectors=False,
    )
    return float(values[0])
