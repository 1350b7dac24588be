"""The files of a stored model: which of them transformers reads, and which tensors they hold.

The files are those that transformers itself would take: the one that `config.json` names, else `model.safetensors`,
else those that `model.safetensors.index.json` names, else the same in PyTorch's pickle format. Other files of the
folder are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import torch

from ..errors import ModelError, first_line
from .files import config_of, find_file, read_json

SAFE = ".safetensors"
_INDEX = ".index.json"
_CANDIDATES = (
    f"model{SAFE}",
    f"model{SAFE}{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)


@final
@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a checkpoint is, and what its file's header says of it.

    Attributes:
        file: the safetensors file.
        dtype: dtype as safetensors writes it, such as BF16, U8 or I32.
        shape: shape of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def checkpoint_files(name: str) -> list[Path]:
    """Return the weight files of a model that transformers would load, sorted by name; fetched if need be.

    Raises:
        ModelError: as `located` does.
    """
    return located(name)[0]


def located(name: str) -> tuple[list[Path], Mapping[str, str]]:
    """Return the weight files of a model, and the file that an index names for each tensor, if there is an index.

    Args:
        name: hub name or folder.

    Raises:
        ModelError: if there are none, the index is damaged, or it names a file that is missing or outside the folder.
    """
    explicit = config_of(name).get("transformers_weights")
    if explicit:
        check_inside(name, explicit, "config.json")
    for candidate in (explicit,) if explicit else _CANDIDATES:
        file = find_file(name, candidate)
        if file is not None:
            return shards_of(name, file) if candidate.endswith(_INDEX) else ([file], {})
    beside = sorted(file.name for file in Path(name).glob("*") if file.suffix in {SAFE, ".bin", ".pt", ".pth"})
    raise ModelError(
        f"Expected weights in {name!r}, as {explicit or ' or '.join(_CANDIDATES[:2])}, and there are none"
        + (f"; {', '.join(beside[:3])} is not what transformers loads a model from." if beside else ".")
    )


def shards_of(name: str, index: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files that an index names, sorted by name and fetched if need be, and what it says of each tensor.

    Args:
        name: hub name or folder.
        index: the index.
    """
    from transformers.utils.hub import get_checkpoint_shard_files

    content = read_json(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise ModelError(f"Expected weight_map and metadata in {index}, got {', '.join(content) or 'nothing'}.")
    for shard in shards.values():
        check_inside(name, shard, index.name)
    missing = [shard for shard in sorted(set(shards.values())) if not (index.parent / shard).is_file()]
    if missing and Path(name).is_dir():
        raise ModelError(f"{index} names {missing[0]}, which is not there. Download or copy it again.")
    try:
        files, _ = get_checkpoint_shard_files(name, str(index))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot fetch the weights of {name!r}: {first_line(error)}") from error
    return [Path(file) for file in files], shards


def check_inside(name: str, place: Any, source: str) -> None:
    """Raise a `ModelError` if a file that a checkpoint names is not inside its own folder.

    The hub's cache keeps its files elsewhere, and links to them; links of any other folder count as what they point to.

    Args:
        name: hub name or folder.
        place: the file as the checkpoint names it.
        source: the file that names it.
    """
    path = PurePosixPath(place) if isinstance(place, str) else PurePosixPath("..")
    inside = not path.is_absolute() and ".." not in path.parts
    folder = Path(name).resolve()
    if inside and folder.is_dir():
        from huggingface_hub.constants import HF_HUB_CACHE

        homes = [folder, Path(HF_HUB_CACHE).resolve()]
        if folder.parent.name == "snapshots":
            homes.append(folder.parent.parent / "blobs")
        inside = any((folder / place).resolve().is_relative_to(home) for home in homes)
    if not inside:
        raise ModelError(
            f"{source} of {name!r} names {place!r}, which lies outside the model's folder; it is not followed. Copy "
            "the file into the folder if you trust it."
        )


def stored_tensors(name: str) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors checkpoint is, by its name in the checkpoint.

    Args:
        name: hub name or folder.

    Raises:
        ModelError: if a file is damaged or a pickle, or tensors are not where the index says, or twice.
    """
    tensors: dict[str, StoredTensor] = {}
    files, index = located(name)
    for file in files:
        if not file.name.endswith(SAFE):
            raise ModelError(
                f"Expected safetensors, got {file.name} in {name!r}: this is PyTorch's pickle format, which can run "
                "any code while it is read, and is not read here. Convert it to safetensors."
            )
        with opened(file) as content:
            for key in content.keys():  # noqa: SIM118 # no mapping
                if key in tensors:
                    raise ModelError(
                        f"{tensors[key].file} and {file.name} both have a tensor {key}, and it is not clear which one "
                        "counts. Download or copy the model again."
                    )
                # transformers reads a tensor from the file that the index names. If it lies in another one as well, or
                # only there, index and files belong to different uploads, and what would be read is not what was meant.
                parts = PurePosixPath(index.get(key, file.name)).parts
                if file.parts[-len(parts) :] != parts:
                    raise ModelError(
                        f"The index of {name!r} looks for {key} in {index[key]}, but it is in {file.name}: they are "
                        "not of the same upload. Download or copy the model again."
                    )
                header = content.get_slice(key)
                tensors[key] = StoredTensor(file, header.get_dtype(), tuple(header.get_shape()))
    return tensors


@contextmanager
def opened(file: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """Open a safetensors file inside a `with` statement.

    Args:
        file: the file.
        device: the device that its tensors are read to.

    Raises:
        ModelError: if it is damaged, here or while it is read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", device=str(device)) as content:
            yield content
    except (OSError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{file} is damaged or incomplete ({first_line(error)}). Download or copy it again."
        ) from error
