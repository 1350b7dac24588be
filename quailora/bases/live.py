"""The quantized layers of a model in memory, as a base that adapters can be made for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import ModelError, NumericalError
from ..models.quantized import quantization_of
from ..quantizers import FP4, NF4, Int8, QuantizedWeight, Quantizer
from .existing import ExistingBase
from .live_weights import kind_of, live_weight
from .reader import StoredBase

_INNER = "base_layer"
"""The attribute in which layers of PEFT hold the layer that they wrap."""

_STOCK_BLOCK_SIZE = 64


@final
@dataclass(frozen=True, eq=False)
class LiveBase(ExistingBase):
    """The quantized layers of a model in memory, by the names that they have in the model without an adapter.

    Attributes:
        model: a transformers model, or a `PeftModel` around one.
    """

    model: Any

    @property
    @override
    def title(self) -> str:
        return self.place or type(self.model).__name__

    @property
    def place(self) -> str:
        """Hub name or folder that the model was loaded from; empty if it does not say."""
        return str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The quantized layers by name; those inside a layer of PEFT have the name of that layer."""
        inner = getattr(self.model, "get_base_model", None)
        plain = inner() if callable(inner) else self.model
        return {
            name.removesuffix(f".{_INNER}"): module
            for name, module in plain.named_modules()
            if not hasattr(module, _INNER) and kind_of(module) is not None
        }

    @property
    @override
    def layers(self) -> frozenset[str]:
        return frozenset(self.modules)

    @cached_property
    @override
    def checkpoint(self) -> str | None:
        """Where the model was loaded from, if it was quantized there already; None if it was quantized on the way."""
        try:
            return self.place if self.place and quantization_of(self.place) else None
        except ModelError:
            return None

    @property
    @override
    def quantizer(self) -> Quantizer | None:
        """The quantizer of bitsandbytes that made all layers while the model was loaded; None for every other base."""
        made = {quantizer_of(module) for module in self.modules.values()}
        return made.pop() if len(made) == 1 and self.checkpoint is None else None

    @override
    def vectors(self, names: Collection[str]) -> dict[str, Tensor]:
        # A training may have changed those of the model itself.
        return {} if self.checkpoint is None else StoredBase(self.checkpoint).vectors(names)

    @override
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        if layer not in self.modules:
            raise ModelError(f"Expected a quantized layer {layer} in {self.title!r}, and there is none.")
        try:
            weight = live_weight(self.modules[layer], dtype, device)
        except (ModelError, NumericalError) as error:
            raise ModelError(f"Layer {layer}: {error}") from error
        if weight is None:
            raise ModelError(f"Layer {layer} is not quantized any more: it was replaced after the base was read.")
        return weight


def quantizer_of(module: Any) -> Quantizer | None:
    """Return the quantizer that stock transformers has applied to a layer of bitsandbytes; None for other layers."""
    if kind_of(module) != "bitsandbytes":
        return None
    if hasattr(module, "state"):
        return Int8()
    state = getattr(module.weight, "quant_state", None)
    quantizers = {"nf4": NF4, "fp4": FP4}
    if state is None or state.blocksize != _STOCK_BLOCK_SIZE or state.quant_type not in quantizers:
        return None
    rearranged = getattr(state, "packing_format_for_cpu", False)  # for the CPU, see `as_stored`
    nested = state.original_nested if rearranged else state.nested
    return quantizers[state.quant_type](double_quantization=bool(nested))
