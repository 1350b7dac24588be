"""What this machine has: memory, and how fast it multiplies; and sizes and times for people."""

from __future__ import annotations

import re
import time

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
