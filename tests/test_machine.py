"""What the machine has, on systems that lack what Linux has."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import psutil
import pytest

import quailora
from quailora.errors import DistributedError
from quailora.support.distributed import process_group
from quailora.support.machine import cores, peak_memory, reset_peak_memory

POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.fixture
def no_proc(monkeypatch):
    """A system without /proc."""

    def refuse(self, *arguments, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)


def test_cores_are_counted_everywhere(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_memory_is_measured_everywhere(no_proc, monkeypatch):
    reset_peak_memory()
    resident = psutil.Process().memory_info().rss
    assert 0.5 * resident < peak_memory() < 100 * resident
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert 0.5 * resident < peak_memory() < 2 * resident


def test_macos_counts_in_bytes(no_proc, monkeypatch):
    there = peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory() == pytest.approx(there / 1024, rel=0.1)


def test_nothing_is_imported_at_the_top_that_only_posix_has():
    for file in Path(quailora.__file__).parent.rglob("*.py"):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            assert not POSIX_ONLY.intersection(names), file


def test_each_process_needs_its_own_gpu(gpu, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    wanted = r"at most one process for each GPU of a host, got 2 processes and 1 of them. Try .*--nproc-per-node 1"
    with pytest.raises(DistributedError, match=wanted), process_group("cuda"):
        pass
