"""The least error of a family that is linear in its parameters, by NumPy on the matrix of its change."""

from __future__ import annotations

import math

import numpy as np
import torch


def least_error(family, objective):
    """Return the least error, from a least-squares problem with one column for each parameter."""
    shape = tuple(objective.error.shape)
    ((name, size),) = family.shapes(shape, 4).items()
    units = torch.eye(math.prod(size), dtype=torch.float64)
    changes = torch.stack([family.change({name: unit.view(size)}, torch.zeros(shape)).weight for unit in units])
    values, vectors = torch.linalg.eigh(objective.metric.product(torch.eye(shape[1], dtype=torch.float64)))
    root = vectors * values.clamp(min=0).sqrt()
    columns, right = (changes @ root).flatten(1).T.numpy(), (objective.error.double() @ root).flatten().numpy()
    found = np.linalg.lstsq(columns, right, rcond=1e-13)[0]
    return float(((right - columns @ found) ** 2).sum())
