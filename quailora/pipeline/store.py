"""Where a run keeps what has become of each layer: in memory, or in a folder that a killed run leaves behind."""

from __future__ import annotations

import shutil
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override

from ..calibration.activations import Activations
from ..families import Correction
from ..layer.record import LayerRecord


@final
@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What has become of one layer.

    Attributes:
        record: its errors; None if the layer is only quantized.
        correction: likewise.
        dequantized: `Q`, where it is needed later.
        packed: `QuantizedWeight.packed`, likewise.
    """

    record: LayerRecord | None = None
    correction: Correction | None = None
    dequantized: Tensor | None = None
    packed: Mapping[str, Tensor] = field(default_factory=dict)


def weights_of(layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
    """Return `Q` of each layer, where it was kept."""
    return {name: layer.dequantized for name, layer in layers.items() if layer.dequantized is not None}


def corrections_of(layers: Mapping[str, StoredLayer]) -> dict[str, Correction]:
    """Return the correction of each layer that has one."""
    return {name: layer.correction for name, layer in layers.items() if layer.correction is not None}


class Store(ABC):
    """Keeps finished layers by name, and the hidden states between blocks.

    Attributes:
        outlives: whether what is kept outlives the process.
    """

    outlives: ClassVar[bool] = True

    @property
    @abstractmethod
    def activations(self) -> Activations:
        """Keeps hidden states."""

    @property
    @abstractmethod
    def blocks_done(self) -> int:
        """Blocks whose layers and outputs are all here."""

    @abstractmethod
    def set_blocks_done(self, blocks: int) -> None:
        """Note how many blocks are done."""

    @abstractmethod
    def folder_for(self, purpose: str) -> Path:
        """Return a folder for temporary files, which is removed with the rest."""

    @abstractmethod
    def remove(self) -> None:
        """Remove everything; the run is complete."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Return whether a layer is finished."""

    @abstractmethod
    def save(self, key: str, layer: StoredLayer) -> None:
        """Keep a finished layer."""

    @abstractmethod
    def load(self, key: str) -> StoredLayer:
        """Return a finished layer.

        Raises:
            ResumeError: if what was kept is damaged.
        """


@final
class MemoryStore(Store):
    """Keeps everything in the memory of the process, and ends with it."""

    outlives: ClassVar[bool] = False

    def __init__(self) -> None:
        self._activations = Activations()
        self._layers: dict[str, StoredLayer] = {}
        self._blocks_done = 0
        self._temporary: Path | None = None

    @property
    @override
    def activations(self) -> Activations:
        return self._activations

    @property
    @override
    def blocks_done(self) -> int:
        return self._blocks_done

    @override
    def set_blocks_done(self, blocks: int) -> None:
        self._blocks_done = blocks

    @override
    def has(self, key: str) -> bool:
        return key in self._layers

    @override
    def save(self, key: str, layer: StoredLayer) -> None:
        self._layers[key] = layer

    @override
    def load(self, key: str) -> StoredLayer:
        return self._layers[key]

    @override
    def folder_for(self, purpose: str) -> Path:
        if self._temporary is None:
            self._temporary = Path(mkdtemp(prefix="quailora-"))
            # Removed with this object, also when the process ends by an exception.
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        folder = self._temporary / purpose
        folder.mkdir(exist_ok=True)
        return folder

    @override
    def remove(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
