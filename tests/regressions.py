"""The least error over one tensor of an adapter, by NumPy on the matrix of its change."""

from __future__ import annotations

import numpy as np
import torch


def least_error(family, objective, parameters, end, base=None):
    """Return the least error over one tensor in which the change is linear, with all others as they are."""
    found = {name: tensor.double() for name, tensor in parameters.items()}
    moment = objective.metric.product(torch.eye(objective.error.shape[1], dtype=torch.float64))
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt()

    def weighted(tensor):
        return (family.change({**found, end: tensor}, base).weight @ root).flatten()

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(weighted, found[end]).flatten(1).numpy()
    constant = weighted(torch.zeros_like(found[end]))
    right = ((objective.error.double() @ root).flatten() - constant).numpy()
    return float(((right - jacobian @ np.linalg.lstsq(jacobian, right, rcond=1e-12)[0]) ** 2).sum())
