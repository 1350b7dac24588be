"""A model that is quantized already: its layers, read one by one from its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from ..models.checkpoint import checkpoint_files
from ..models.locate import resolve
from ..models.quantized import quantization_of
from ..quantizers import QuantizedWeight
from .awq import read_awq
from .bitsandbytes import read_bitsandbytes
from .gptq import read_gptq
from .hqq import read_hqq
from .torchao import read_torchao

Reader = Callable[[Mapping[str, Tensor], Mapping[str, Any], torch.dtype], QuantizedWeight]

READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "hqq": read_hqq,
    "torchao": read_torchao,
}
"""By `quant_method` of the checkpoint's `quantization_config`."""

_MARKS = {
    "gptq": re.compile("qweight$"),
    "awq": re.compile("qweight$"),
    "bitsandbytes": re.compile(r"SCB$|weight\.quant_state\."),
    "hqq": re.compile("W_q$"),
    "torchao": re.compile("_weight_qdata$"),
}
"""Tensors that only quantized layers have."""


@final
@dataclass(frozen=True)
class StoredBase:
    """A quantized checkpoint.

    Attributes:
        name: hub name or folder.
    """

    name: str

    @cached_property
    def described(self) -> dict[str, Any]:
        """Its `quantization_config`; empty for a model that is not quantized.

        Raises:
            ModelError: if there is no configuration, or it cannot be read.
        """
        return quantization_of(resolve(self.name))

    @property
    def config(self) -> dict[str, Any]:
        """Its `quantization_config`.

        Raises:
            ModelError: if there is none, or quailora does not read its kind.
        """
        if not self.described:
            raise ModelError(f"Expected a quantized checkpoint, but {self.name!r} has no quantization_config.")
        method = self.described["quant_method"]
        if method not in READERS:
            raise ModelError(f"{self.name!r} is quantized by {method!r}. quailora reads {', '.join(READERS)}.")
        return self.described

    @cached_property
    def index(self) -> dict[str, dict[str, Path]]:
        """The file of each tensor of each module: by the module's name, then by the tensor's name in it."""
        found: dict[str, dict[str, Path]] = {}
        for file in checkpoint_files(resolve(self.name)):
            with safe_open(file, "pt") as content:
                for key in content.keys():  # noqa: SIM118 # no mapping
                    module, tensor = split_key(key)
                    found.setdefault(module, {})[tensor] = file
        return found

    @cached_property
    def layers(self) -> frozenset[str]:
        """Names of the quantized layers; raises as `config` does."""
        mark = _MARKS[self.config["quant_method"]]
        return frozenset(name for name, tensors in self.index.items() if any(map(mark.match, tensors)))

    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        """Return the weight of a layer.

        Args:
            layer: module name.
            dtype: that it computes in.
            device: to read it to.

        Raises:
            ModelError: if the layer is not there, not quantized, or damaged.
        """
        if layer not in self.layers:
            raise ModelError(f"Expected a quantized layer {layer} in {self.name!r}, and there is none.")
        tensors: dict[str, Tensor] = {}
        places = {name: file for name, file in self.index[layer].items() if name != "bias"}
        for file in set(places.values()):
            with safe_open(file, "pt", device=str(device)) as content:
                tensors |= {name: content.get_tensor(f"{layer}.{name}") for name in places if places[name] == file}
        return READERS[self.config["quant_method"]](tensors, self.config, dtype)


def split_key(key: str) -> tuple[str, str]:
    """Return the module of a tensor of a checkpoint, and the tensor's name in it, which may have dots."""
    place = key.rfind(".weight")
    if place > 0:
        return key[:place], key[place + 1 :]
    module, _, tensor = key.rpartition(".")
    return module, tensor
