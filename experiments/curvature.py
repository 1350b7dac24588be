"""Largest eigenvalue of the Hessian of the training loss in the trained factors, before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .training import base_of as base_of  # noqa: PLC0414 # the caller loads models by it


def top_eigenvalue(model: Any, windows: Tensor, iterations: int = 12, tolerance: float = 0.02) -> float:
    """Return the largest eigenvalue of the Hessian by Lanczos (SciPy's ARPACK), over products with the Hessian.

    Args:
        model: a `PeftModel` whose trained parameters require gradients, with attention that can be differentiated
            twice (`attn_implementation="eager"`), in float32.
        windows: token ids, (batch, tokens), over which the loss is the mean.
        iterations: restarts of Lanczos at most.
        tolerance: relative accuracy of the eigenvalue.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    loss = model(input_ids=windows, labels=windows).loss
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).ravel()).split(sizes)
        directions = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        products = torch.autograd.grad(gradients, parameters, directions, retain_graph=True)
        return torch.cat([part.flatten() for part in products]).numpy()

    size = sum(sizes)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    return float(eigsh(operator, 1, which="LA", v0=start, ncv=8, maxiter=iterations, tol=tolerance,
                       return_eigenvectors=False)[0])  # fmt: skip
