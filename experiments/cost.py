"""Seconds and memory of a training step with each start, measured in turn in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .arms import ARMS
from .protocol import Run
from .runs import Bench
from .scoring import rounds
from .training import model_of
from .ways import optimizer_of

_ARMS = ("qlora", "best", "best-frozen")


@dataclass
class Stepper:
    """A model with its optimizer, of which steps are measured.

    Attributes:
        model: the `PeftModel`.
        optimizer: over its trained factors.
        seconds: seconds of each step.
        saved: bytes of the tensors that autograd has saved in the last step, each storage once.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    seconds: list[float]
    saved: int = 0

    def step(self, windows: Tensor) -> None:
        """Train one step."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast(windows.device.type, torch.bfloat16, enabled=rounds(windows.device)):
                loss = self.model(input_ids=windows, labels=windows, use_cache=False).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if windows.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        # Weights are saved by autograd, too, but are there anyway.
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        self.saved = sum(size for place, size in kept.items() if place not in own)

    @property
    def state(self) -> int:
        """Bytes of the trained factors, their gradients and the optimizer's averages."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        averages = [part for entry in self.optimizer.state.values() for part in entry.values()]
        return 2 * sum(weight.nbytes for weight in trained) + sum(part.nbytes for part in averages)

    @property
    def frozen(self) -> int:
        """Bytes of the factors that are not trained."""
        weights = self.model.named_parameters()
        return sum(weight.nbytes for name, weight in weights if "lora_" in name and not weight.requires_grad)


def costs(bench: Bench, rank: int, steps: int) -> list[dict[str, Any]]:
    """Return seconds and memory of a step with each start, steps of all of them in turn, as rows to keep.

    Args:
        bench: where starts are.
        rank: rank that is trained.
        steps: steps of each.
    """
    windows = bench.data().windows
    steppers = {}
    for arm in _ARMS:
        run = Run(arm, rank)
        model = model_of(run, ARMS[arm], bench.start(run), bench.protocol)
        steppers[arm] = Stepper(model, optimizer_of(model, run, ARMS[arm]), [])
    batch = bench.protocol.batch
    for index in range(steps + 1):
        for stepper in steppers.values():
            stepper.step(windows[index * batch : (index + 1) * batch].to(stepper.model.device))
    plain = steppers["qlora"].seconds[1:]  # the first step allocates
    return [
        {
            "key": f"{arm}-r{rank}",
            "arm": arm,
            "rank": rank,
            "seconds": round(median(stepper.seconds[1:]), 3),
            "ratio": round(median(own / other for own, other in zip(stepper.seconds[1:], plain, strict=True)), 3),
            "state": stepper.state,
            "saved": stepper.saved,
            "frozen": stepper.frozen,
        }
        for arm, stepper in steppers.items()
    ]
