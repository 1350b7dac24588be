"""The base that a quantizer makes of a full-precision model, while other weights are in the place of its own."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from typing_extensions import override

from ..errors import ConfigurationError, ModelError
from ..models.layers import linear_layers, stock_quantizes
from ..models.load import empty_model
from ..models.locate import resolve
from ..models.single import LayerFiles
from ..quantizers import QuantizedWeight, Quantizer
from .existing import ExistingBase


@final
@dataclass(frozen=True)
class FreshBase(ExistingBase):
    """A base that is quantized from the files of a full-precision model, layer by layer, when a layer is asked for.

    It is the one that stock transformers makes while it loads the model, for quantizers that it has.

    Attributes:
        name: hub name or folder of the model.
        made_by: the quantizer, which looks at no inputs.
        trust_remote_code: see `load_model`.
    """

    name: str
    made_by: Quantizer
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.made_by.needs_calibration:
            raise ConfigurationError(f"{self.made_by!r} looks at inputs. Write its base first, by init.")

    @property
    @override
    def title(self) -> str:
        return f"{self.name} by {self.made_by!r}"

    @property
    @override
    def quantizer(self) -> Quantizer:
        return self.made_by

    @property
    @override
    def writable(self) -> bool:
        return True

    @cached_property
    def _model(self) -> Any:
        return empty_model(self.name, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _files(self) -> LayerFiles:
        return LayerFiles(resolve(self.name), self._model)

    @property
    @override
    def layers(self) -> frozenset[str]:
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        stock = self.made_by.stock_config() is not None
        return frozenset(
            name for name, layer in linear_layers(self._model).items() if not stock or stock_quantizes(layer)
        )

    @override
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        if layer not in self.layers:
            raise ModelError(f"Expected a layer {layer} that {self.made_by!r} quantizes, and there is none.")
        # From the file and not from the model, whose layers hold other weights by now.
        return self.made_by.quantize(self._files.weight(layer).to(device, dtype))


@final
@dataclass(frozen=True)
class MadeBase(ExistingBase):
    """A base that was made for one result and is written into its folder, read from where it was made.

    Attributes:
        place: the base where it was made.
        made_by: the quantizer that has made it.
    """

    place: ExistingBase
    made_by: Quantizer

    @property
    @override
    def title(self) -> str:
        return repr(self.made_by)

    @property
    @override
    def quantizer(self) -> Quantizer:
        return self.made_by

    @property
    @override
    def writable(self) -> bool:
        return True

    @property
    @override
    def layers(self) -> AbstractSet[str]:
        return self.place.layers

    @override
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        return self.place.weight(layer, dtype, device)
