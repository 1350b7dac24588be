"""Threads are pinned and recorded, and the rate of this machine's matrix products with them."""

from __future__ import annotations

import os
import platform

import pytest
import torch


def pytest_configure():
    torch.set_num_threads(int(os.environ.get("QUAILORA_BENCH_THREADS", os.cpu_count() or 1)))


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["threads"] = torch.get_num_threads()
    machine_info["vectors"] = torch.backends.cpu.get_cpu_capability()
    machine_info["torch"] = torch.__version__
    machine_info["platform"] = platform.platform()


@pytest.fixture
def record(benchmark):
    """Write values beside the time."""
    return lambda **values: benchmark.extra_info.update(values)
