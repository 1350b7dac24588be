"""What experiments share that keep one row of JSON for each job."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .runs import Store


class Jobs(ABC):
    """An experiment of several jobs, of which any number of processes carry out those that are left.

    Args:
        store: the rows that are there.
        folder: folder for locks, and for jobs that are not finished.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder

    @abstractmethod
    def _jobs(self) -> list[str]:
        """Return the names of all jobs, most important first."""

    @abstractmethod
    def _row(self, job: str) -> dict[str, Any] | None:
        """Carry out a job, and return its row; None if it has to wait for another one."""

    def left(self) -> None:
        """Print the jobs that are left."""
        done = self._done()
        print("\n".join(job for job in self._jobs() if job not in done))

    def run(self, only: str = "", seconds: float = 1e9) -> None:
        """Carry out the jobs that are left, except for those that another process is at.

        Args:
            only: jobs whose names contain this.
            seconds: after which no further job is begun.
        """
        began = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        for job in self._jobs():
            lock = FileLock(self._folder / f"{job.replace('/', '-')}.lock")
            if only not in job or job in self._done() or time.monotonic() - began > seconds or not acquired(lock):
                continue
            try:
                if job not in self._done():  # another process may have finished it just now
                    row = self._row(job)
                    if row is not None:
                        self._store.add({"key": job, **row})
            finally:
                lock.release()

    def _done(self) -> set[str]:
        return {row["key"] for row in self._store.rows()}


def acquired(lock: FileLock) -> bool:
    """Return whether a lock was free, and take it."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
