"""The start of a training that has left some directions as they were, read from what it has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .provenance import Origin, digest_of
from .saved import A, B, SavedAdapter


def noting_start(origin: Origin, tensors: Mapping[str, Tensor]) -> Origin:
    """Return an origin with the hashes of the tensors of an adapter before its training.

    Args:
        origin: what the adapter is made from.
        tensors: its tensors, by their names in the file.
    """
    return replace(origin, initial=digest_of(tensors), frozen=digest_of_frozen(tensors, origin.frozen_rank))


def digest_of_frozen(tensors: Mapping[str, Tensor], rank: int | None) -> str:
    """Return the hash of the first directions of LoRA; empty if there are none, or if others add something, too.

    Args:
        tensors: tensors of an adapter, by their names in the file.
        rank: the number of the first directions.
    """
    if rank is None or not all(key.endswith((A, B)) for key in tensors):
        return ""
    if any(tensor[:, rank:].any() for key, tensor in tensors.items() if key.endswith(B)):
        return ""
    return digest_of({key: part[:rank] if key.endswith(A) else part[:, :rank] for key, part in tensors.items()})


def frozen_start(trained: SavedAdapter, origin: Origin, own: list[str]) -> SavedAdapter | None:
    """Return the start that a training has left in its frozen directions; None if they are not as they were.

    The others added nothing before the training, since their columns of `lora_B` were zero.

    Args:
        trained: the adapter after training.
        origin: what it notes.
        own: names of its tensors, without those of modules that are trained whole.
    """
    rank = origin.frozen_rank
    if rank is None or not origin.frozen:
        return None
    tensors = {key: trained.tensors[key] for key in own}
    for key in [key for key in own if key.endswith(B)]:
        tensors[key] = tensors[key].clone()
        tensors[key][:, rank:] = 0
    start = SavedAdapter(trained.folder, trained.config, tensors)
    return start if digest_of_frozen(tensors, rank) == origin.frozen else None
