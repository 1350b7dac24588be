"""The state of a run that can be killed at any time: a manifest, finished layers, hidden states."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import distributed
from .errors import ResumeError
from .models.activations import Activations
from .objective import Deferred
from .outputs import write_json, write_tensors
from .report.record import LayerRecord
from .solvers import LowRank

_PACKED = "packed."


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one layer.

    Attributes:
        record: its errors; None if the layer is only quantized.
        low_rank: its correction, likewise.
        dequantized: `Q`, where it is needed later.
        packed: `QuantizedWeight.packed`, likewise.
    """

    record: LayerRecord | None = None
    low_rank: LowRank | None = None
    dequantized: Tensor | None = None
    packed: Mapping[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder with everything that a killed run leaves behind.

    Files are complete or absent, so whatever is there can be used. They lie in a folder named by the fingerprint:
    a host of a distributed run that keeps its own may hold some of an older run.

    Attributes:
        folder: the folder.
        fingerprint: what the run depends on, item by item.
    """

    folder: Path
    fingerprint: Mapping[str, str]

    @property
    def state(self) -> Path:
        """Where files of this very run are."""
        digest = hashlib.sha256(json.dumps(dict(self.fingerprint)).encode()).hexdigest()
        return self.folder / f"run-{digest[:12]}"

    @property
    def activations(self) -> Activations:
        """Keeps hidden states in this folder."""
        return Activations(self.state / "activations")

    def folder_for(self, purpose: str) -> Path:
        """Return a folder for temporary files; it goes with the rest."""
        folder = self.state / purpose
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def blocks_done(self) -> int:
        """Blocks whose layers and outputs are all here."""
        return int(self.manifest().get("blocks_done", 0))

    def set_blocks_done(self, blocks: int) -> None:
        """Write down how many blocks are done."""
        if distributed.rank() == 0:
            write_json(self.folder / "manifest.json", {"fingerprint": dict(self.fingerprint), "blocks_done": blocks})

    def has(self, layer: str) -> bool:
        """Return whether a layer is finished."""
        return self._path(layer).is_file()

    def save(self, layer: str, outcome: Outcome) -> None:
        """Keep a finished layer."""
        tensors: dict[str, Tensor] = {}
        if outcome.low_rank is not None:
            low_rank = outcome.low_rank
            tensors = {"lora_A": low_rank.lora_A, "lora_B": low_rank.lora_B, "energies": low_rank.energies}
        if outcome.dequantized is not None:
            tensors["dequantized"] = outcome.dequantized
        tensors |= {f"{_PACKED}{name}": tensor for name, tensor in outcome.packed.items()}
        record = json.dumps(asdict(outcome.record) if outcome.record else None)
        self._path(layer).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(self._path(layer), tensors, {"record": record})

    def load(self, layer: str) -> Outcome:
        """Return a finished layer; its tensors are memory-mapped.

        Raises:
            ResumeError: if its file is damaged.
        """
        path = self._path(layer)
        try:
            with safe_open(path, "pt") as file:
                content = json.loads(file.metadata()["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ResumeError(f"The state in {path} is damaged: {error}. Start again with --fresh.") from error
        packed = {name.removeprefix(_PACKED): tensor for name, tensor in tensors.items() if name.startswith(_PACKED)}
        if content is None:
            return Outcome(dequantized=tensors["dequantized"], packed=packed)
        record = LayerRecord.read(content)
        total = Deferred.known(record.error_none)
        gain = record.error_none - record.error
        low_rank = LowRank(tensors["lora_A"], tensors["lora_B"], gain, tensors["energies"], total)
        return Outcome(record, low_rank, tensors.get("dequantized"), packed)

    def remove(self) -> None:
        """Remove the folder; the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, layer: str) -> Path:
        return self.state / "layers" / f"{layer}.safetensors"

    def manifest(self) -> dict[str, Any]:
        """Return what is written down of the run that the folder belongs to.

        Raises:
            ResumeError: if the file is damaged.
        """
        path = self.folder / "manifest.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ResumeError(f"The manifest {path} is damaged: {error}. Start again with --fresh.") from error
        return content


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make sure that only one run uses a folder; the lock goes with the process that holds it, however that ends.

    Raises:
        ResumeError: if another run uses it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
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
        if not (folder / "manifest.json").exists():  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)


def open_checkpoint(folder: Path, fingerprint: Mapping[str, str], fresh: bool) -> Checkpoint:
    """Return the state of this very run, new or half done.

    Args:
        folder: an existing folder that this process has locked.
        fingerprint: what the run depends on, item by item.
        fresh: remove what another run left.

    Raises:
        ResumeError: if the folder holds the state of a run that depends on something else; the message says on what.
    """
    checkpoint = Checkpoint(folder, fingerprint)
    if distributed.rank() == 0:
        before = {} if fresh else checkpoint.manifest().get("fingerprint", {})
        changed = [name for name in {**before, **fingerprint} if before and before.get(name) != fingerprint.get(name)]
        if changed:
            told = "; ".join(f"{name}: {before.get(name)} then, {fingerprint.get(name)} now" for name in changed)
            raise ResumeError(
                f"{folder} holds the state of a run with other settings ({told}). Repeat that run's command to finish "
                "it, choose another output folder, or start again with --fresh."
            )
        if not before:
            for state in folder.glob("run-*"):
                shutil.rmtree(state)
            checkpoint.set_blocks_done(0)
    distributed.barrier()
    (checkpoint.state / "layers").mkdir(exist_ok=True, parents=True)
    return checkpoint
