"""A base that is quantized already, wherever it is: in a checkpoint, or in the layers of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import final

import torch
from torch import Tensor

from ..errors import ModelError, TargetError
from ..models.layers import Layer
from ..quantizers import QuantizedWeight, Quantizer


class ExistingBase(ABC):
    """Gives the quantized weights of layers by their names in the plain transformers model."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The name of the base in messages."""

    @property
    @abstractmethod
    def layers(self) -> AbstractSet[str]:
        """Names of the quantized layers.

        Raises:
            ModelError: if the base cannot be read.
        """

    @abstractmethod
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        """Return the weight of a layer.

        Args:
            layer: name of the layer.
            dtype: the dtype that the layer computes in.
            device: the device that the weight is brought to.

        Raises:
            ModelError: if the layer is not there, not quantized, or damaged.
        """

    def vectors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return norms and biases of the base beside its layers, as far as they are stored with it; see `check_around`.

        Args:
            names: names of parameters of the plain transformers model, all of them vectors.
        """
        del names
        return {}

    @property
    def checkpoint(self) -> str | None:
        """Hub name or folder of a checkpoint of the base; None if there is none."""
        return None

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer that makes the same base of the full-precision model while it loads; None if unknown."""
        return None

    @property
    def writable(self) -> bool:
        """Whether a run may write the base, because it is not there as a checkpoint."""
        return False

    @final
    def among(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return the layers that the base has in quantized form."""
        known = self.layers
        return {name: layer for name, layer in layers.items() if name in known}

    @final
    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise a `TargetError` that names layers which the base does not have in quantized form, if there are any."""
        missing = list(layers.keys() - self.among(layers).keys())
        if missing:
            raise TargetError(
                f"{len(missing)} of {len(layers)} target layers are not quantized in {self.title!r}, {min(missing)} "
                "among them, so there is nothing to correct. Leave them out of the targets; if that is all of them, "
                "this is the base of another model."
            )

    @final
    def weight_of(self, layer: Layer) -> QuantizedWeight:
        """Return the weight of a layer of the full-precision model, in its dtype and on its device.

        Raises:
            ModelError: as `weight` does, or if the shapes differ.
        """
        # Two models of one family have layers of the same names. Shapes tell apart those of different sizes; the hashes
        # of `check` tell apart the rest.
        weight = layer.weight
        stored = self.weight(layer.name, weight.dtype, weight.device)
        if stored.shape != tuple(weight.shape):
            raise ModelError(
                f"{layer.name} has shape {tuple(weight.shape)} in the model and {stored.shape} in {self.title!r}. This "
                "is the base of another model."
            )
        return stored
