"""The memory and the speed of this machine, and how sizes and times are printed."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from ..errors import ConfigurationError, DoesNotFitError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SMALLEST, _LARGEST = 768, 6144  # sides of the products that are timed
_MEASURABLE = 1e-3  # seconds
_FULL = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")  # of PyTorch and CUDA's libraries
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def flops(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return how many operations a second square products of a device do, once they are large enough to fill it.

    It is measured once in a process for each number of threads.
    """
    return _flops(dtype, device, torch.get_num_threads())


@cache
def _flops(dtype: torch.dtype, device: str, threads: int) -> float:
    del threads  # the speed depends on it
    # A small product does not fill a fast device, and a large one takes seconds on a slow one. So the side is doubled
    # until the product takes a measurable time; the best of four leaves out pauses of the machine.
    best, side = 0.0, _SMALLEST // 2
    while best < _MEASURABLE and side < _LARGEST:
        side *= 2
        matrix, best = torch.ones(side, side, dtype=dtype, device=device), float("inf")
        for _ in range(4):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # which waits for a GPU
            best = min(best, time.perf_counter() - start)
    return 2 * float(side) ** 3 / best


def memory_available(limit: str | None, device: str = "cpu") -> int:
    """Return how many bytes of a device's memory a run may use: the limit, or four fifths of what is free now.

    Raises:
        ConfigurationError: if the limit cannot be read.
    """
    # A fifth is left for what is not counted: the allocator's fragments, other processes, the file cache.
    return parse_size(limit) if limit is not None else free_memory(device) * 4 // 5


def free_memory(device: torch.device | str) -> int:
    """Return how many bytes of a device's own memory are free; for the CPU, those of the machine."""
    if torch.device(device).type == "cuda":
        # PyTorch keeps what it has freed for later tensors.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    import psutil

    return int(psutil.virtual_memory().available)


@contextmanager
def within_memory(advice: str) -> Iterator[None]:
    """Turn a failed allocation on a device inside a `with` statement into an error of one line.

    Args:
        advice: what may need less memory; the message says "Try" in front of it.

    Raises:
        DoesNotFitError: if PyTorch finds no memory for a tensor.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(mark in str(error) for mark in _FULL):
            raise
        # PyTorch's message goes on with advice about its allocator; its first sentence says how much memory was
        # missing.
        parts = str(error).partition("DefaultCPUAllocator: ")
        first = (parts[2] or parts[0]).partition(". GPU ")[0].splitlines()[0].rstrip(".")
        raise DoesNotFitError(f"The memory is full ({first}). Try {advice}.") from error


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
    # Linux counts the peak of resident memory (VmHWM) and can start again; elsewhere the peak is since the process
    # started.
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
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigurationError(f"Expected a size such as 8GiB, 500MB or 4G, got {text!r}.")
    unit = match[2].upper()
    return int(float(match[1]) * (_DECIMAL if match[3].upper() == "B" else _UNITS)[unit])


def size(number: int) -> str:
    """Return a number of bytes as a text such as `1.50 GiB`."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return a number of seconds as a text such as `45 s` or `12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
