"""The error for tensors that are not those of one layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import ModelError


def misfit(tensors: Mapping[str, Tensor], expected: str) -> ModelError:
    """Return the error that says what was expected and what shapes came."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return ModelError(f"Expected the tensors of {expected}, got {shapes}.")
