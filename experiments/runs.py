"""Carry out one run, and keep results where they are found again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from quailora.models.locate import resolve

from .arms import ARMS
from .data import Data, load_data
from .protocol import Protocol, Run
from .scoring import held_out_losses, rounds, window_losses
from .starts import being_made, start_folder, start_place
from .tasks import TASKS, answered, bits, read_items
from .training import model_of, train

RESULTS = Path(__file__).parent / "results"


class Store:
    """Results of a protocol: one line of JSON for each run on a device, to which any number of processes may add.

    Args:
        protocol: the protocol.
        folder: folder of the results.
        kind: what is kept; the results of runs if empty.
    """

    def __init__(self, protocol: Protocol, folder: Path = RESULTS, kind: str = "") -> None:
        self.path = folder / (f"{protocol.name}-{kind}.jsonl" if kind else f"{protocol.name}.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        """Return all results."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def done(self) -> set[str]:
        """Return the keys of what has been carried out on a device like this one."""
        return {row["key"] for row in self.rows() if row["device"] == device_name()}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a result, with the name of the device."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "device": device_name()}) + "\n")


class Bench:
    """Where runs are carried out: the texts they need, and a folder for starts and trained adapters.

    Args:
        protocol: how runs train and are scored.
        texts: folder with the texts.
        folder: folder for starts and trained adapters.
    """

    def __init__(self, protocol: Protocol, texts: Path, folder: Path) -> None:
        self.protocol, self.texts, self.folder = protocol, texts, folder / protocol.name

    @cache  # noqa: B019 # there is one bench in a process
    def data(self) -> Data:
        """Return the data."""
        return load_data(self.texts, AutoTokenizer.from_pretrained(resolve(self.protocol.model)), self.protocol)

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train and score a run, keep its adapter, and return its result."""
        arm, data, start = ARMS[run.arm], self.data(), self.start(run)
        model = model_of(run, arm, start, self.protocol)
        before = self.score(model) if run.curve else None
        place = self.folder / "adapters" / run.key
        scratch = place.with_name(f"{run.key}.trainer")
        training = train(model, run, arm, data, self.protocol, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(place)
        return {
            "key": run.key,
            **run.as_dict(),
            "before": before,
            "after": self.score(model),
            "training": asdict(training),
            "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        }

    def start(self, run: Run) -> Path | None:
        """Return the folder of the start of a run, which is made if it is not there; None for plain LoRA."""
        return start_folder(
            ARMS[run.arm], run.rank, run.calibration, self.data(), self.texts, self.starts, self.protocol
        )

    def waits(self, run: Run) -> bool:
        """Whether the start of a run is being made by another process."""
        place = start_place(ARMS[run.arm], run.rank, run.calibration, self.starts)
        return place is not None and being_made(place)

    @property
    def starts(self) -> Path:
        """Folder of the starts."""
        return self.folder / "starts"

    def trained_model(self, run: Run) -> Any:
        """Return the model of a run that was carried out, with its trained adapter."""
        model = model_of(run, ARMS[run.arm], self.start(run), self.protocol)
        tensors = load_file(self.folder / "adapters" / run.key / "adapter_model.safetensors")
        set_peft_model_state_dict(model, tensors, adapter_name="default")
        return model

    def answer(self, run: Run, *, trained: bool, limit: int | None) -> dict[str, Any]:
        """Return which items of each task the model of a run answers right, before or after its training.

        Args:
            run: the run; before training its rate is without meaning.
            trained: after training, or before.
            limit: number of items of each task, the first ones.
        """
        model = self.trained_model(run) if trained else model_of(run, ARMS[run.arm], self.start(run), self.protocol)
        tokenizer = AutoTokenizer.from_pretrained(resolve(self.protocol.model))
        found = {task: answered(model, tokenizer, read_items(self.texts / f"{task}.jsonl", limit)) for task in TASKS}
        return {
            **run.as_dict(),
            "key": answer_key(run, trained=trained, limit=limit),
            "trained": trained,
            "items": {task: {name: bits(right) for name, right in asdict(one).items()} for task, one in found.items()},
        }

    def score(self, model: Any) -> dict[str, list[float]]:
        """Return the losses on the held-out pairs and on WikiText-2, in nats a token."""
        data = self.data()
        scores = {**held_out_losses(model, data.held_out), "wikitext2": window_losses(model, data.wikitext)}
        return {name: [round(loss, 5) for loss in losses] for name, losses in scores.items()}


def device_name() -> str:
    """Return the name of the GPU; "CPU" without one, or "CPU in float32" if it does not multiply in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU" if rounds(torch.device("cpu")) else "CPU in float32"


def answer_key(run: Run, *, trained: bool, limit: int | None) -> str:
    """Return the key of what `Bench.answer` returns."""
    return f"{run.key}-{'after' if trained else 'before'}-{limit or 'all'}"
