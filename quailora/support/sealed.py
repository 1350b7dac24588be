"""Files of tensors with a hash of their content, which shows whether they have changed since they were written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DIGEST = "digest"


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metadata of a file with a hash of all that is in it."""
    return {**(metadata or {}), _DIGEST: _digest(tensors, metadata or {})}


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, memory-mapped, and its metadata.

    Raises:
        OSError, SafetensorError: if the file cannot be read. What is in it is not compared with its hash.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 # no mapping


def is_intact(path: Path) -> bool:
    """Return whether a file can be read and holds what was written, down to the last bit."""
    try:
        tensors, metadata = read_sealed(path)
        return metadata.get(_DIGEST) == _digest(tensors, metadata)
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return False


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    # safetensors writes its header in any order, so the hash is over content in a fixed order and not over the file.
    # The entry "format" is added by whoever writes the file, and the hash cannot be part of itself.
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(metadata.items()):
        if name not in {_DIGEST, "format"}:
            digest.update(f"{name}={value}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
