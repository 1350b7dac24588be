"""The hidden states between two blocks, batch by batch: in memory, or in files that a later run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..support.files import write_tensors
from ..support.sealed import sealed


@final
class Activations:
    """Keeps hidden states by boundary (how many blocks are behind them), network and batch.

    In a folder they are memory-mapped when read, so the operating system may drop them from memory at any time.

    Args:
        folder: the folder for the files; None keeps hidden states in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[tuple[int, str, int], Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, boundary: int, network: str, batch: int, hidden: Tensor) -> None:
        """Keep hidden states."""
        if self._folder is None:
            self._memory[boundary, network, batch] = hidden
        else:
            tensors = {"hidden": hidden.cpu().contiguous()}
            write_tensors(self._path(self._folder, boundary, network, batch), tensors, sealed(tensors))

    def load(self, boundary: int, network: str, batch: int, device: torch.device) -> Tensor:
        """Return hidden states on a device.

        Raises:
            CalibrationError: if their file is not there.
        """
        if self._folder is None:
            return self._memory[boundary, network, batch].to(device)
        from safetensors.torch import load_file

        path = self._path(self._folder, boundary, network, batch)
        if not path.is_file():
            raise CalibrationError(
                f"Expected hidden states in {path}, but there is no such file. A run on several hosts goes on only "
                "with as many processes as before, or on a shared file system. Start again with `fresh=True`."
            )
        return load_file(path)["hidden"].to(device)

    def drop(self, boundary: int) -> None:
        """Delete all hidden states at a boundary."""
        self._memory = {key: hidden for key, hidden in self._memory.items() if key[0] != boundary}
        if self._folder is not None:
            for path in self._folder.glob(f"{boundary}-*"):
                path.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, boundary: int, network: str, batch: int) -> Path:
        return folder / f"{boundary}-{network}-{batch}.safetensors"
