"""Which adapter a training has started from: found by its hash, and compared with what training has made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import ConfigurationError, ModelError
from ..families import Family
from ..support.files import StrPath
from .frozen_start import digest_of_frozen, frozen_start
from .hub import adapter_folder
from .provenance import digest_of, read_provenance
from .saved import SCALING, SavedAdapter

ZERO = "zero"
"""Stands for the start of an adapter that added nothing before its training, as plain LoRA does."""

_RELATED = 0.8  # of the rows of lora_A point to the same side before and after training
_DEPTH = 2  # folders above and below that are looked through for a start

_ADD_NOTHING = (True, None, "gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` with which an adapter adds nothing at first, on a base that stays as it was."""


def initial_of(trained: SavedAdapter, initial: StrPath | None) -> SavedAdapter | None:
    """Return the adapter that a training started from; None if it added nothing.

    Args:
        trained: the adapter after training.
        initial: its folder or hub name, or "zero"; None takes it from the frozen directions of the trained adapter, or
            looks for it by the hash that training keeps.

    Raises:
        ConfigurationError: if it has to be named, or the adapter did add something before its training.
        ModelError: if it cannot be read.
    """
    if initial is None:
        return find_initial(trained)
    if str(initial) != ZERO:
        return SavedAdapter.read(adapter_folder(initial))
    check_added_nothing(trained)
    return None


def find_initial(trained: SavedAdapter) -> SavedAdapter:
    """Return the adapter that a training started from, by the hash of its factors.

    Where directions were frozen, it is read from them. Otherwise the folders around the trained adapter and those
    around the current one are looked through.

    Raises:
        ConfigurationError: if the adapter does not note a hash, or no folder here holds what has it.
    """
    origin = read_provenance(trained.folder).origin
    if origin is None or not origin.initial:
        raise ConfigurationError(
            f"{trained.folder} does not say which adapter its training started from. Pass the folder of that adapter "
            f"as `initial`, or `initial='{ZERO}'` if it added nothing before its training, as plain LoRA does."
        )
    kept = frozen_start(trained, origin, adapter_keys(trained))
    if kept is not None:
        return kept
    # Checkpoints of a trainer lie one or two folders below the run, and starts beside it; nothing is searched further.
    places = [trained.folder.resolve(), *trained.folder.resolve().parents[:_DEPTH], Path.cwd()]
    for folder in adapters_around(places):
        if noted_digest(folder) != origin.initial:
            continue
        saved = SavedAdapter.read(folder)
        if digest_of_adapter(saved) == origin.initial:
            return saved
    raise ConfigurationError(
        f"{trained.folder} notes that its training started from factors with the hash {origin.initial}, and no adapter "
        f"in the folders around {trained.folder.resolve().parent} and {Path.cwd()} has them. Pass the folder that init "
        "wrote as `initial`, or the one that save_pretrained wrote after quailora.initialize and before the training."
    )


def adapters_around(places: list[Path]) -> Iterator[Path]:
    """Yield the folders with an adapter in some folders and up to two levels inside of them, each once."""
    seen: set[Path] = set()
    patterns = ["/".join(["*"] * depth + ["adapter_config.json"]) for depth in range(_DEPTH + 1)]
    for place in places:
        if place == place.parent:  # not the whole file system
            continue
        for pattern in patterns:
            for file in sorted(place.glob(pattern)):
                if file.parent not in seen:
                    seen.add(file.parent)
                    yield file.parent


def noted_digest(folder: Path) -> str | None:
    """Return the hash of the factors before training that an adapter notes; None if it notes none, or is damaged."""
    try:
        origin = read_provenance(folder).origin
    except ModelError:
        return None
    return None if origin is None else origin.initial


def digest_of_adapter(saved: SavedAdapter) -> str:
    """Return the hash of all tensors of an adapter but those of modules that are trained whole."""
    return digest_of({key: saved.tensors[key] for key in adapter_keys(saved)})


def check_added_nothing(trained: SavedAdapter) -> None:
    """Raise a `ConfigurationError` if an adapter is known to have added something before its training."""
    origin = read_provenance(trained.folder).origin
    if origin is not None:
        raise ConfigurationError(
            f"Expected an adapter that added nothing before its training, but {trained.folder} notes that it started "
            f"from factors with the hash {origin.initial or 'of an earlier version'}. Leave `initial` out, or pass the "
            "folder that it started from."
        )
    # Families other than LoRA have no such entry: where they start from noise of their own, all of it counts as
    # trained.
    start = trained.config.get("init_lora_weights")
    if start not in _ADD_NOTHING:
        raise ConfigurationError(
            f"Expected an adapter that added nothing before its training, but {trained.folder} started by "
            f"init_lora_weights={start!r}, which changes the base or adds something. Pass the adapter as it was before "
            "its training as `initial`, saved by save_pretrained."
        )


def check_trained_from(family: Family, trained: SavedAdapter, before: SavedAdapter) -> None:
    """Raise a `ConfigurationError` if a training did not start from another adapter, as far as the files tell.

    Args:
        family: the kind of both adapters.
        trained: the adapter after training; AdaLoRA may have cut directions off.
        before: the adapter before training.
    """
    if family.name == "lora":
        check_pair(trained, before)
        check_started_from(trained, before)
        return
    own, pruned = adapter_keys(before), family.name == "adalora"
    sizes = [
        {key: None if pruned else tuple(tensor.shape) for key, tensor in saved.tensors.items() if key in own}
        for saved in (trained, before)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(started_elsewhere(trained.folder, before.folder, "their layers or shapes differ"))
    origin = read_provenance(trained.folder).origin
    digest = digest_of_adapter(before)
    if origin is not None and origin.initial and origin.initial != digest:
        reason = f"it notes that training started from tensors with the hash {origin.initial}, and theirs is {digest}"
        raise ConfigurationError(started_elsewhere(trained.folder, before.folder, reason))
    fixed = tuple(family.untrained)
    for key in own:
        if fixed and key.endswith(fixed) and not torch.equal(trained.tensors[key], before.tensors[key]):
            raise ConfigurationError(started_elsewhere(trained.folder, before.folder, f"{key} differs"))


def check_pair(trained: SavedAdapter, before: SavedAdapter) -> None:
    """Raise a `ConfigurationError` unless training can have started from the other adapter."""
    differences = [
        f"{name} is {trained.config.get(name)!r} in one and {before.config.get(name)!r} in the other"
        for name in SCALING
        if (trained.config.get(name) or None) != (before.config.get(name) or None)
    ]
    if not differences and trained.shapes != before.shapes:
        differences = ["their layers or shapes differ"]
    if differences:
        raise ConfigurationError(
            f"{trained.folder} was not trained from {before.folder}: {'; '.join(differences)}. Pass the folder that "
            "init wrote as `initial`."
        )


def check_started_from(trained: SavedAdapter, before: SavedAdapter) -> None:
    """Raise a `ConfigurationError` if the factors say that training started from another adapter.

    An adapter of `init` notes a hash of its factors, which training keeps. Where there is none, the share of directions
    (rows of `lora_A`, of all layers) that point to the same side before and after decides: nearly all do after
    training, however far it went, and about half in runs of `init` on other text or another base, whose signs are
    arbitrary.
    """
    origin = read_provenance(trained.folder).origin
    if origin is not None and origin.initial:
        if origin.frozen and digest_of_frozen(before.tensors, origin.frozen_rank) == origin.frozen:
            return  # it adds what the start added, whatever the rows of `lora_A` beside columns of zeros are
        if origin.initial != before.digest:
            raise ConfigurationError(
                f"{trained.folder} was not trained from {before.folder}: it notes that training started from factors "
                f"with the hash {origin.initial}, and the hash of those is {before.digest}. Pass the folder that init "
                "wrote as `initial`."
            )
        return
    # Signs of singular vectors are arbitrary: two independent runs agree in half of them. Training turns rows by less
    # than a right angle as a rule, however long it takes.
    pairs = ((trained.factors(stem).lora_A, before.factors(stem).lora_A) for stem in before.stems)
    same_side = torch.cat([(after * start).sum(1) >= 0 for after, start in pairs])
    share = same_side.float().mean().item()
    if share < _RELATED:
        raise ConfigurationError(
            f"{trained.folder} was hardly trained from {before.folder}: only {share:.0%} of the rows of lora_A point "
            "to the same side, as in two adapters that have nothing to do with each other. Pass the folder that init "
            "wrote as `initial`."
        )


def check_without_earlier(before: SavedAdapter) -> None:
    """Raise a `ConfigurationError` if a start holds what an earlier training has changed, as `rebase` writes it."""
    origin = read_provenance(before.folder).origin
    if origin is not None and origin.holds:
        raise ConfigurationError(
            f"The start {before.folder} holds the change of an earlier training besides its correction, so that both "
            "changes together are no adapter of this kind. Write the merged model: convert with `merge=True`, or "
            "quailora.merge_full."
        )


def adapter_keys(saved: SavedAdapter) -> list[str]:
    """Return the names of the tensors of an adapter, without those of modules that are trained whole."""
    whole = saved.config.get("modules_to_save") or ()
    return [key for key in saved.tensors if not any(f".{name}." in key for name in whole)]


def started_elsewhere(trained: Path, before: Path, reason: str) -> str:
    """Return what to say of an adapter that was not trained from another one."""
    return f"{trained} was not trained from {before}: {reason}. Pass the folder that it started from as `initial`."
