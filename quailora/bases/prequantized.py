"""The quantizer of a base that is there already: each layer gets the weight that is stored for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from jaxtyping import Float
from torch import Tensor

from ..core.statistics import InputStatistics
from ..errors import ConfigurationError, ModelError, TargetError
from ..models.layers import Layer
from ..quantizers import QuantizedWeight, Quantizer
from .reader import StoredBase


@final
@dataclass(frozen=True)
class Prequantized(Quantizer):
    """The base of another tool: bitsandbytes in 4 or 8 bits, GPTQ, AWQ, HQQ, torchao in 8 bits.

    It knows layers by their names, so it quantizes layers of whole models only.

    Attributes:
        base: hub name or folder of the quantized checkpoint.
    """

    base: str

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise a `TargetError` that names layers that the base does not have in quantized form, if there are any."""
        missing = list(layers.keys() - self.among(layers).keys())
        if missing:
            raise TargetError(
                f"{len(missing)} of {len(layers)} target layers are not quantized in {self.base!r}, {min(missing)} "
                "among them, so there is nothing to correct. Leave them out of --targets; if that is all of them, this "
                "is the base of another model."
            )

    def among(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return the layers that the base has in quantized form."""
        known = opened(self.base).layers
        return {name: layer for name, layer in layers.items() if name in known}

    def for_layer(self, name: str) -> Quantizer:
        """Return a quantizer that gives the weight stored for a layer."""
        return Stored(self.base, name)

    def encode(  # noqa: D102
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> QuantizedWeight:
        del weight, statistics
        raise ConfigurationError(f"{self!r} knows layers by name: ask for_layer for the quantizer of one.")

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None


@final
@dataclass(frozen=True)
class Stored(Quantizer):
    """Gives the weight that is stored for one layer, whatever it is asked to quantize.

    Attributes:
        base: hub name or folder of the quantized checkpoint.
        layer: module name.
    """

    base: str
    layer: str

    def encode(  # noqa: D102
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> QuantizedWeight:
        del statistics
        stored = opened(self.base).weight(self.layer, weight.dtype, weight.device)
        if stored.shape != tuple(weight.shape):
            raise ModelError(
                f"{self.layer} has shape {tuple(weight.shape)} in the model and {stored.shape} in {self.base!r}. This "
                "is the base of another model."
            )
        return stored

    def stock_config(self) -> dict[str, object] | None:  # noqa: D102
        return None


def opened(base: str) -> StoredBase:
    """Return a checkpoint, whose configuration and index are read once, as long as its files stay as they are."""
    folder = Path(base).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return _opened(base, tuple((file.name, file.lstat().st_size, file.lstat().st_mtime_ns) for file in files))


@cache
def _opened(base: str, files: tuple[tuple[str, int, int], ...]) -> StoredBase:
    """Return a checkpoint; files are part of the key alone."""
    del files
    return StoredBase(base)
