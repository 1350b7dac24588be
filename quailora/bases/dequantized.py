"""A base that is there in dequantized form: quantized weights, stored as floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ..errors import ModelError
from ..models.layers import Layer, all_layers
from ..models.load import empty_model, load_model
from ..models.locate import resolve
from ..models.single import LayerFiles
from ..quantizers import QuantizedWeight
from .existing import ExistingBase


@final
@dataclass(frozen=True, eq=False)
class FloatWeight(QuantizedWeight):
    """A quantized weight of which the values are kept, and not the codes.

    Attributes:
        values: `Q`.
    """

    values: Float[Tensor, "out_features in_features"]

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        # The codes are not known. Two bases of this kind are compared by their values.
        return {"weight": self.values}

    @override
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        return self.values


@final
@dataclass(frozen=True)
class DequantizedBase(ExistingBase):
    """A checkpoint of quantized weights in floating point, as `init` writes formats that transformers does not load.

    Attributes:
        name: hub name or folder.
    """

    name: str

    @property
    @override
    def title(self) -> str:
        return self.name

    @property
    @override
    def checkpoint(self) -> str:
        return self.name

    @cached_property
    def _model(self) -> Any:
        return empty_model(self.name)

    @cached_property
    def _files(self) -> LayerFiles:
        return LayerFiles(resolve(self.name), self._model)

    @cached_property
    def _layers(self) -> Mapping[str, Layer]:
        return all_layers(self._model)

    @cached_property
    def _loaded(self) -> Mapping[str, Layer]:
        """Layers of the model in memory."""
        return all_layers(load_model(self.name, "auto", "cpu").model)

    @property
    @override
    def layers(self) -> frozenset[str]:
        return frozenset(self._layers)

    @override
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        if layer not in self._layers:
            raise ModelError(f"Expected a linear layer {layer} in {self.name!r}, and there is none.")
        # Files hold experts one by one or fused, as the family has it. The loaded model has them as slices.
        fused = self._layers[layer].expert is not None
        found = self._loaded[layer].weight if fused else self._files.weight(layer)
        # As a layer of the model would hold it: in the dtype that is computed in.
        return FloatWeight(found.to(device, dtype))
