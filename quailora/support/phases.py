"""Seconds and peak memory of each phase of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch

from .machine import peak_memory, reset_peak_memory

_MIB = 2.0**20

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class Phases:
    """Collects an entry for each phase: `seconds`, `peak_memory_mib` (resident), `peak_cuda_memory_mib` with a GPU."""

    entries: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the body of a `with` statement as one phase."""
        logger.info("%s ...", name.capitalize())
        reset_peak_memory()
        start = time.perf_counter()
        yield
        entry = {"seconds": round(time.perf_counter() - start, 3), "peak_memory_mib": round(peak_memory() / _MIB, 1)}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            entry["peak_cuda_memory_mib"] = round(torch.cuda.max_memory_allocated() / _MIB, 1)
        self.entries[name] = entry
        logger.info("%s took %.1f s.", name.capitalize(), entry["seconds"])
