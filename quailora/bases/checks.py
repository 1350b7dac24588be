"""Checks that the stored tensors of a layer are complete, finite, and of shapes that fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import ModelError


def check_present(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise a `ModelError` that says what is missing unless all these tensors are there."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ModelError(
            f"Expected {', '.join(names)}, and {', '.join(missing)} is missing. Download or copy the checkpoint again."
        )


def check_words(tensors: Mapping[str, Tensor], names: Iterable[str], dtypes: Iterable[torch.dtype]) -> None:
    """Raise a `ModelError` unless these tensors are matrices of codes in one of these dtypes."""
    for name in names:
        if tensors[name].dtype not in dtypes or tensors[name].ndim != 2:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ModelError(f"Expected codes in {name}, a matrix of {allowed}, got {described(tensors[name])}.")


def check_scales(tensors: Mapping[str, Tensor], names: Iterable[str], *, negative: bool = True) -> None:
    """Raise a `ModelError` unless those of these tensors that are there hold finite numbers.

    Args:
        tensors: the stored tensors of a layer.
        names: names of the tensors to check.
        negative: whether numbers may be negative.
    """
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ModelError(f"Expected floating-point numbers in {name}, got {described(tensor)}.")
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise ModelError(f"Expected finite numbers in {name}, got {bad} of {tensor.numel()} NaN or infinite.")
        if not negative and bool((tensor < 0).any()):
            raise ModelError(f"Expected no negative number in {name}, got {float(tensor.min()):.3g}.")


def misfit(tensors: Mapping[str, Tensor], expected: str) -> ModelError:
    """Return the error that says what was expected and what shapes came."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return ModelError(f"Expected the tensors of {expected}, got {shapes}.")


def described(tensor: Tensor) -> str:
    """Return dtype and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
