"""The full-precision weights of single layers, read from a model's files one by one when they are asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError, WeightsNotFoundError
from .checkpoint import SAFE, StoredTensor, opened, shards_of, stored_tensors
from .locate import resolve
from .names import names_in
from .quantized import FLOATS

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ONE_FILE = f"model{SAFE}"
_INDEX = f"{_ONE_FILE}.index.json"


@final
@dataclass(frozen=True, eq=False)
class LayerFiles:
    """The weights of a full-precision model in safetensors files, of which no more is read than is asked for.

    Attributes:
        path: a file whose name ends in `model.safetensors`, the folder of such a file or of several with their index,
            or a hub name.
        model: the same model in memory, of which only the names and kinds of its layers are looked at.
    """

    path: str
    model: Any

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where each tensor is, by its name in the files.

        Raises:
            WeightsNotFoundError: if there are no such files.
            ModelError: if a file is damaged.
        """
        path = Path(self.path).expanduser()
        folder = path.parent if path.name.endswith(_ONE_FILE) else path
        one = path if path.name.endswith(_ONE_FILE) else folder / _ONE_FILE
        if one.is_file():
            files = [one]
        elif (folder / _INDEX).is_file():
            files = shards_of(str(folder), folder / _INDEX)[0]
        elif folder.is_dir():
            raise WeightsNotFoundError(
                f"Expected {_ONE_FILE} or {_INDEX} in {str(folder)!r}, and there is neither. Pass the folder of the "
                "full-precision model; files in other formats are not read here."
            )
        else:
            return self._of_a_name()
        return {key: place for file in files for key, place in in_file(file).items()}

    def _of_a_name(self) -> dict[str, StoredTensor]:
        try:
            return stored_tensors(resolve(self.path.removesuffix(f"/{_ONE_FILE}")))
        except ModelError as error:
            raise WeightsNotFoundError(
                f"Expected the full-precision weights at {self.path!r}, and they could not be found: {error}"
            ) from error

    @cached_property
    def skeleton(self) -> Any:
        """The model in full precision without weights; None if it is not made from a configuration of transformers."""
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):
            return None
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return type(self.model)(config)

    @cached_property
    def keys(self) -> dict[str, str]:
        """The name in the files of each layer's weight, by the name of the layer in the model."""
        keys = [key for key in self.tensors if key.endswith("weight")]
        names: dict[str, str | None] = dict(zip(keys, keys, strict=True))
        if self.skeleton is not None:
            names = names_in(self.skeleton, keys)
        return {new.removesuffix(".weight"): key for key, new in names.items() if new is not None}

    def place(self, layer: str) -> tuple[str, StoredTensor]:
        """Return the name of a layer's weight in the files, and where it is; raises as `weight` does."""
        key = self.keys.get(layer)
        if key is None:
            raise ModelError(
                f"Expected the weight of {layer} in {self.path!r}, and it is not there under a name of its own. The "
                "files are of another model, or hold this layer merged with others."
            )
        stored = self.tensors[key]
        if stored.dtype not in FLOATS or len(stored.shape) != 2:
            raise ModelError(
                f"Expected a full-precision matrix as {key} in {stored.file}, got {stored.dtype} of shape "
                f"{stored.shape}. Pass the model that was not quantized."
            )
        return key, stored

    def dtype(self, layer: str) -> torch.dtype:
        """Return the dtype of a layer's weight, by the header of its file; raises as `weight` does."""
        return _DTYPES[self.place(layer)[1].dtype]

    def weight(self, layer: str) -> Float[Tensor, "out_features in_features"]:
        """Return the weight of a layer on the CPU, in the dtype of the file.

        Args:
            layer: module name in the model without an adapter.

        Raises:
            WeightsNotFoundError: as `tensors` does.
            ModelError: if the files have no such weight, or hold it quantized, or a file is damaged.
        """
        from transformers.pytorch_utils import Conv1D

        # Conv1D stores (in_features, out_features), as do the files of its models.
        key, stored = self.place(layer)
        with opened(stored.file) as content:
            weight: Tensor = content.get_tensor(key)
        turned = self.skeleton is not None and isinstance(self.skeleton.get_submodule(layer), Conv1D)
        return weight.T if turned else weight


def in_file(file: Path) -> dict[str, StoredTensor]:
    """Return what the header of one safetensors file says; see `stored_tensors`."""
    with opened(file) as content:
        headers = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 # no mapping
        return {key: StoredTensor(file, each.get_dtype(), tuple(each.get_shape())) for key, each in headers.items()}
