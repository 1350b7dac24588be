"""The state of a run that can be killed at any time: a manifest, finished layers, hidden states."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from ..calibration.activations import Activations
from ..errors import QuailoraError, ResumeError
from ..families import Correction, Family
from ..layer.record import LayerRecord
from ..support import distributed
from ..support.files import storing, write_json, write_tensors
from ..support.sealed import is_intact, read_sealed, sealed
from ..support.settings import build, describe
from .store import Store, StoredLayer

logger = logging.getLogger("quailora")

_PACKED, _PARAMETER, _ENERGIES = "packed.", "parameter.", "energies"
_LOCK = "lock"
_STATE = re.compile(r"run-[0-9a-f]{12}")  # the name of a folder with the files of one run
_SPILLED = re.compile(r"(offload|changed)-\d+")  # of one with weights that one process has put on disk


@final
@dataclass(frozen=True, eq=False)
class Checkpoint(Store):
    """A folder with everything that a killed run leaves behind.

    Files are complete or absent, and carry a hash of their content, so whatever is there and has kept its hash can be
    used. They lie in a folder named by the fingerprint:
    a host of a distributed run that keeps its own may hold some of an older run.

    Attributes:
        folder: the folder.
        fingerprint: what the run depends on, item by item.
    """

    folder: Path
    fingerprint: Mapping[str, str]

    @property
    def state(self) -> Path:
        """The folder for the files of exactly this run."""
        digest = hashlib.sha256(json.dumps(dict(self.fingerprint)).encode()).hexdigest()
        return self.folder / f"run-{digest[:12]}"

    @property
    @override
    def activations(self) -> Activations:
        """Keeps hidden states in this folder."""
        return Activations(self.state / "activations")

    @override
    def folder_for(self, purpose: str) -> Path:
        """Return a folder for temporary files, which is removed with the rest."""
        folder = self.state / purpose
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    @override
    def blocks_done(self) -> int:
        """Number of blocks whose layers and outputs are all stored."""
        return int((self.manifest() or {}).get("blocks_done", 0))

    @override
    def set_blocks_done(self, blocks: int) -> None:
        """Write down how many blocks are done."""
        if distributed.rank() == 0:
            processes = distributed.world_size()
            content = {"fingerprint": dict(self.fingerprint), "blocks_done": blocks, "processes": processes}
            write_json(self.folder / "manifest.json", {**content, "digest": digest_of_json(content)})

    @override
    def has(self, key: str) -> bool:
        """Return whether a layer is finished."""
        return self._path(key).is_file()

    @override
    def save(self, key: str, layer: StoredLayer) -> None:
        # One file for each layer and method. It is complete or absent, and its hash says whether it is still what was
        # written.
        tensors: dict[str, Tensor] = {}
        if layer.correction is not None:
            tensors = {f"{_PARAMETER}{name}": tensor for name, tensor in layer.correction.parameters.items()}
            if layer.correction.energies is not None:
                tensors[_ENERGIES] = layer.correction.energies
        if layer.dequantized is not None:
            tensors["dequantized"] = layer.dequantized
        tensors |= {f"{_PACKED}{name}": tensor for name, tensor in layer.packed.items()}
        record = json.dumps(asdict(layer.record) if layer.record else None)
        family = json.dumps(describe(layer.correction.family) if layer.correction else None)
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(self._path(key), tensors, sealed(tensors, {"record": record, "family": family}))

    @override
    def load(self, key: str) -> StoredLayer:
        """Return a finished layer; its tensors are memory-mapped.

        Raises:
            ResumeError: if its file is damaged.
        """
        path = self._path(key)
        try:
            tensors, metadata = read_sealed(path)
            content, family = json.loads(metadata["record"]), json.loads(metadata["family"])
            built = build(Family, family) if family else None  # type: ignore[type-abstract]
        except (OSError, SafetensorError, KeyError, ValueError, QuailoraError) as error:
            raise ResumeError(f"The state in {path} is damaged: {error}. Run the same command again.") from error
        packed, parameters = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (_PACKED, _PARAMETER)
        )
        if content is None or built is None:
            return StoredLayer(dequantized=tensors.get("dequantized"), packed=packed)
        record = LayerRecord.read(content)
        correction = Correction(built, parameters, record.shape, tensors.get(_ENERGIES))
        return StoredLayer(record, correction, tensors.get("dequantized"), packed)

    @override
    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.state / "layers" / f"{key}.safetensors"

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the run that the folder belongs to; None if the manifest is damaged."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kept = content.pop("digest")
            return content if kept == digest_of_json(content) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def remove_damaged(self) -> bool:
        """Remove the files that have changed since they were written; return whether the walk has to start again.

        Layers whose files are gone are made again. If hidden states are gone, the walk starts again from the first
        block.
        """
        damaged = [
            path for path in sorted(self.state.rglob("*.safetensors")) if self._is_kept(path) and not is_intact(path)
        ]
        for path in damaged:
            logger.warning("%s has changed since it was written. It is made again.", path)
            path.unlink(missing_ok=True)
        return any("activations" in path.relative_to(self.state).parts for path in damaged)

    def _is_kept(self, path: Path) -> bool:
        return path.relative_to(self.state).parts[0] in {"layers", "activations"}


def digest_of_json(content: Any) -> str:
    """Return a short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make sure that only one run uses a folder; the lock goes with the process that holds it, however that ends.

    Raises:
        ResumeError: if another run uses it.
    """
    from filelock import FileLock, Timeout

    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Whatever else lies in the folder stays there: callers may name one that they use for other things as well.
    own = not any(map(is_foreign, folder.rglob("*")))
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResumeError(
            f"Another run is at work in {folder}. Wait for it to end, or choose another output folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
        # What is left of unfinished runs stays, and a comparison keeps each of its own in a folder inside. Without any
        # manifest there is nothing to go on from.
        if own and not any(folder.rglob("manifest.json")):
            shutil.rmtree(folder, ignore_errors=True)


def remove_state(folder: Path) -> None:
    """Remove a folder with the state of a run, unless it holds other files as well."""
    if not any(map(is_foreign, folder.rglob("*"))):
        shutil.rmtree(folder, ignore_errors=True)


def is_foreign(path: Path) -> bool:
    """Return whether a file in the folder of a run is none of a run."""
    inside = any(_STATE.fullmatch(part) or _SPILLED.fullmatch(part) for part in path.parts)
    return path.is_file() and not inside and path.name not in {_LOCK, "manifest.json"}


def open_checkpoint(folder: Path, fingerprint: Mapping[str, str], fresh: bool) -> Checkpoint:
    """Return the state of this very run, new or half done.

    Args:
        folder: an existing folder that this process has locked.
        fingerprint: what the run depends on, item by item.
        fresh: remove what another run left.

    Raises:
        ResumeError: if the folder holds the state of a run that depends on something else; the message says on what.
    """
    # The first process decides whether the folder is that of this run. Then every process looks through the files that
    # it sees; hidden states that are damaged for one of them send all back to the first block.
    checkpoint = Checkpoint(folder, fingerprint)
    if distributed.rank() == 0:
        claim(checkpoint, fresh)
    distributed.barrier()
    (checkpoint.state / "layers").mkdir(exist_ok=True, parents=True)
    if any(distributed.gather(checkpoint.remove_damaged())):
        checkpoint.set_blocks_done(0)
    distributed.barrier()
    return checkpoint


def claim(checkpoint: Checkpoint, fresh: bool) -> None:
    """Make sure that a folder holds the state of this very run, or of none; see `open_checkpoint`."""
    # Four cases: no manifest (a new run), a damaged one (files of this very run are still known by the name of their
    # folder), one of this run (go on), and one of another run (refuse, and say what differs).
    folder, fingerprint = checkpoint.folder, checkpoint.fingerprint
    manifest = {} if fresh else checkpoint.manifest()
    states = [path for path in folder.iterdir() if _STATE.fullmatch(path.name)]
    others = [state for state in states if fresh or state != checkpoint.state]
    if manifest is None:
        if others:
            raise ResumeError(
                f"The manifest {folder / 'manifest.json'} is damaged, and {folder} holds the state of a run with other "
                "settings. Choose another output folder, or start again with `fresh=True`."
            )
        logger.warning("The manifest in %s is damaged. The layers of this run that are intact are kept.", folder)
        checkpoint.set_blocks_done(0)
        return
    before = manifest.get("fingerprint", {})
    changed = [name for name in {**before, **fingerprint} if before and before.get(name) != fingerprint.get(name)]
    if changed:
        changes = "; ".join(f"{name}: {before.get(name)} then, {fingerprint.get(name)} now" for name in changed)
        raise ResumeError(
            f"{folder} holds the state of a run with other settings ({changes}). Repeat that run's command to finish "
            "it, choose another output folder, or start again with `fresh=True`."
        )
    if not before:
        for state in others:
            shutil.rmtree(state)
    # Batches are made for a number of processes, and hidden states are kept by the number of a batch.
    if not before or manifest.get("processes") != distributed.world_size():
        checkpoint.set_blocks_done(0)
