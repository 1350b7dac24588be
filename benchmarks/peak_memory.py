"""Peak memory of one wide layer, from weight and statistics to factors and errors.

    python benchmarks/peak_memory.py --rows 4096 --columns 14336 --rank 64

Prints the sizes of what must be there, and how far the peak of the process rises above it.
"""

from __future__ import annotations

import pathlib
import time

import torch
from jsonargparse import auto_cli
from problems import realistic_second_moment

from quailora import NF4, Initializer, InputStatistics, Optimal

GIB = 2**30


def memory(field: str) -> float:
    """Return a field of this process's status, GiB: VmRSS is resident now, VmHWM the most so far. Linux only."""
    with pathlib.Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 2**20


def main(rows: int = 4096, columns: int = 14336, rank: int = 64) -> None:
    """Print the peak.

    Args:
        rows: out_features.
        columns: in_features.
        rank: rank of the adapter.
    """
    warm = Initializer(NF4(), Optimal(), 4)
    warm(torch.randn(64, 64), InputStatistics.from_inputs(torch.randn(99, 64)))
    weight = 0.02 * torch.randn(rows, columns)
    statistics = InputStatistics(columns)
    statistics.add(realistic_second_moment(columns), 1)
    kept = (weight.nbytes + statistics.second_moment.nbytes) / GIB
    with pathlib.Path("/proc/self/clear_refs").open("w", encoding="ascii") as reset:
        reset.write("5")  # the peak so far is forgotten: the Gram was made in several copies
    resident = memory("VmRSS")
    start = time.perf_counter()
    layer = Initializer(NF4(), Optimal(), rank)(weight, statistics)
    took = time.perf_counter() - start
    highest = memory("VmHWM")
    print(f"{rows} x {columns}, rank {rank}: {took:.1f} s, error {layer.error / layer.error_none:.2%} of uncorrected")
    print(f"weight {weight.nbytes / GIB:.2f} GiB, Gram {statistics.second_moment.nbytes / GIB:.2f} GiB (float64)")
    print(f"resident before {resident:.2f} GiB ({kept:.2f} of it weight and Gram), peak {highest:.2f} GiB")
    print(f"initialization adds {highest - resident:.2f} GiB")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
