"""A model that is quantized already: its layers, read one by one from its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import ModelError, NumericalError
from ..models.accept import is_known, read_config, skeleton
from ..models.checkpoint import StoredTensor, opened, stored_tensors
from ..models.files import config_of
from ..models.locate import resolve
from ..models.names import names_in
from ..models.quantized import FLOATS, quantization_of
from ..quantizers import QuantizedWeight
from ..quantizers.base import check_finite
from .awq import read_awq
from .bitsandbytes import read_bitsandbytes
from .existing import ExistingBase
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
    "gptq": re.compile("qweight|qzeros|scales|g_idx"),
    "awq": re.compile("qweight|qzeros|scales"),
    "bitsandbytes": re.compile(r"SCB|weight\..*"),
    "hqq": re.compile("W_q|packing"),
    "torchao": re.compile("_weight_qdata|_weight_scale"),
}
"""Tensors that only quantized layers have; one of them is enough, since others may be missing."""


@final
@dataclass(frozen=True)
class StoredBase(ExistingBase):
    """A quantized checkpoint, whose configuration and index are read once.

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
    def index(self) -> dict[str, dict[str, tuple[str, StoredTensor]]]:
        """Where the tensors of each quantized layer are: by its name in the model, then by the tensor's name in it.

        Each with its name in the checkpoint. Raises as `config` does, and if a file is missing or damaged.
        """
        mark = _MARKS[self.config["quant_method"]]
        modules: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
        for key, tensor in stored_tensors(resolve(self.name)).items():
            module, name = split_key(key)
            modules.setdefault(module, {})[name] = key, tensor
        quantized = {
            module: tensors
            for module, tensors in modules.items()
            if any(map(mark.fullmatch, tensors)) or ("weight" in tensors and tensors["weight"][1].dtype not in FLOATS)
        }
        names = self._names(quantized)
        return {names[module]: tensors for module, tensors in quantized.items()}

    def _names(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the name of each module in the model that transformers makes of the checkpoint.

        Modules that transformers merges or turns keep their name, since no module of the model holds the same weight.
        So do all of a model whose class transformers does not have.
        """
        name = resolve(self.name)
        if not is_known(config_of(name)):
            return {module: module for module in modules}
        config = read_config(self.name, name, trust_remote_code=False)
        keys = names_in(
            skeleton(self.name, config, trust_remote_code=False), [f"{module}.weight" for module in modules]
        )
        return {key.removesuffix(".weight"): (new or key).removesuffix(".weight") for key, new in keys.items()}

    @property
    @override
    def layers(self) -> frozenset[str]:
        return frozenset(self.index)

    @override
    def vectors(self, names: Collection[str]) -> dict[str, Tensor]:
        stored = {
            split_key(key): (key, tensor)
            for key, tensor in stored_tensors(resolve(self.name)).items()
            if tensor.dtype in FLOATS and len(tensor.shape) == 1 and split_key(key)[1] in {"weight", "bias"}
        }
        modules = self._names({module for module, _ in stored})
        found: dict[str, Tensor] = {}
        for (module, part), (key, tensor) in stored.items():
            name = f"{modules[module]}.{part}"
            if name in names:
                with opened(tensor.file, "cpu") as content:
                    found[name] = content.get_tensor(key)
        return found

    @override
    def weight(self, layer: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        if layer not in self.index:
            raise ModelError(f"Expected a quantized layer {layer} in {self.name!r}, and there is none.")
        stored = {name: entry for name, entry in self.index[layer].items() if name != "bias"}
        files = sorted({tensor.file for _, tensor in stored.values()})
        tensors: dict[str, Tensor] = {}
        for file in files:
            with opened(file, device) as content:
                keys = {name: key for name, (key, tensor) in stored.items() if tensor.file == file}
                tensors |= {name: content.get_tensor(key) for name, key in keys.items()}
        try:
            weight = READERS[self.config["quant_method"]](tensors, self.config, dtype)
            check_finite(weight.dequantize())
        except (ModelError, NumericalError) as error:
            raise ModelError(f"Layer {layer} in {names_of(files)}: {error}") from error
        return weight


def names_of(files: list[Path]) -> str:
    """Return files in words."""
    return " and ".join(map(str, files))


def split_key(key: str) -> tuple[str, str]:
    """Return the module of a tensor of a checkpoint, and the tensor's name in it, which may have dots."""
    match = re.fullmatch(r"(.+)\.(weight(?:\..+)?)", key)
    if match:
        return match[1], match[2]
    module, _, tensor = key.rpartition(".")
    return module, tensor
