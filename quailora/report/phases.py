"""Seconds and peak memory of each phase of a run."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch

_MIB = 1024.0

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class Phases:
    """Collects one entry a phase: `seconds`, `peak_memory_mib` (resident) and, with a GPU, `peak_cuda_memory_mib`."""

    entries: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the body of a `with` statement as one phase."""
        logger.info("%s ...", name.capitalize())
        _reset_peak()
        start = time.perf_counter()
        yield
        entry = {"seconds": round(time.perf_counter() - start, 3), "peak_memory_mib": round(_peak_mib(), 1)}
        if torch.cuda.is_available():
            entry["peak_cuda_memory_mib"] = round(torch.cuda.max_memory_allocated() / _MIB**2, 1)
        self.entries[name] = entry
        logger.info("%s took %.1f s.", name.capitalize(), entry["seconds"])


def _reset_peak() -> None:
    with suppress(OSError):  # not Linux: the peak is then that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / _MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB
