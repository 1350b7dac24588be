"""What this machine has: memory, and how fast it multiplies; and sizes and times for people."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from .errors import ConfigurationError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def flops(dtype: torch.dtype) -> float:
    """Return how many operations a second a square product of this machine does."""
    matrix = torch.randn(768, 768).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 768.0**3 / best


def memory_available(limit: str | None) -> int:
    """Return how many bytes of memory a run may use: the limit, or four fifths of what is free now.

    Raises:
        ConfigurationError: if the limit cannot be read.
    """
    if limit is not None:
        return parse_size(limit)
    import psutil

    return int(psutil.virtual_memory().available * 4 // 5)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can; also that of the GPU, if one is in use."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return the most bytes of memory that were resident: since the last reset on Linux, of this process elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    try:
        import resource
    except ImportError:
        return int(memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10  # macOS alone counts in bytes


def parse_size(text: str) -> int:
    """Return the bytes that a text like `8GiB`, `500MB` or `4G` means.

    Raises:
        ConfigurationError: if it means none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", text, re.IGNORECASE)
    if not found:
        raise ConfigurationError(f"Expected a size such as 8GiB, 500MB or 4G, got {text!r}.")
    unit = found[2].upper()
    return int(float(found[1]) * (_DECIMAL if found[3].upper() == "B" else _UNITS)[unit])


def size(number: int) -> str:
    """Return bytes for people."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
