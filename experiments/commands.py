"""The commands of the experiment."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal

from filelock import FileLock, Timeout

from .arms import ARMS
from .cost import costs
from .curvature import curvature_of
from .draw import draw_all
from .finishing import finished
from .plan import best_rate, outstanding
from .protocol import PROTOCOLS, CalibrationText, Run
from .runs import RESULTS, Bench, Store, answer_key, device_name
from .training import model_of

logger = logging.getLogger("experiments")

_PATIENCE = 5.0  # seconds between two looks for a start that another process makes


class Experiment:
    """What a better start is worth after training; docs/worth.md explains what is measured.

    Args:
        texts: folder with the instruction pairs, the WikiText-2 test set, other calibration texts and the tasks.
        protocol: how runs train and are scored, see `experiments/protocol.py`.
        folder: folder for starts and trained adapters.
        results: folder of the results.
    """

    def __init__(
        self,
        texts: Path = Path("texts"),
        protocol: Literal["reference", "smoke", "large"] = "reference",
        folder: Path = Path("runs"),
        results: Path = RESULTS,
    ) -> None:
        self._bench, self._results = Bench(PROTOCOLS[protocol], texts, folder), results
        self._store = self._kept()

    def run(
        self,
        arm: str,
        rank: int = 16,
        rate: float = 1.6e-3,
        seed: int = 0,
        calibration: CalibrationText = "train",
        curve: bool = False,
    ) -> None:
        """Carry out one run and keep its result.

        Args:
            arm: name of the arm, see `experiments/arms.py`.
            rank: rank that is trained.
            rate: peak learning rate.
            seed: seed of the order of the batches and of the fresh directions.
            calibration: the text that the start is calibrated on.
            curve: score the held-out pairs before and during training, too.
        """
        self._store.add(self._bench.carry_out(Run(arm, rank, rate, seed, calibration, curve)))

    def queue(self, workers: int = 1, hours: float = 1000.0, families: bool = False) -> None:
        """Carry out the runs that are left, most important first. Can be stopped at any time, and started again.

        Args:
            workers: processes, each on its share of the cores. Two on two cores do 15 % more runs than one.
            hours: hours after which no further run is begun.
            families: compare families of adapters, in place of starts of LoRA.
        """
        if workers > 1:
            self._share(workers, hours, families=families)
            return
        end, store = time.monotonic() + 3600 * hours, self._of(families=families)
        while time.monotonic() < end:
            chosen = claim(self._bench, store, families=families)
            if chosen is None:
                if not any(map(self._bench.waits, left_of(self._bench, store, families=families))):
                    return
                time.sleep(_PATIENCE)
                continue
            one, lock = chosen
            began = time.monotonic()
            try:
                row = self._bench.carry_out(one)
                store.add(row)
            finally:
                lock.release()
            loss = fmean(row["after"]["all"])
            logger.warning("%s: %.4f nats a token on held-out pairs, %.0f s", one.key, loss, time.monotonic() - began)

    def left(self, families: bool = False) -> None:
        """Print the runs that are left, most important first.

        Args:
            families: those that compare families of adapters, in place of starts of LoRA.
        """
        for candidate in left_of(self._bench, self._of(families=families), families=families):
            print(candidate.key)

    def finish(self, arm: str, rate: float, rank: int = 16, seed: int = 0, recipe: str = "best") -> None:
        """Fit the trained adapter of a run again by `quailora.finish`, and keep its scores.

        Args:
            arm: name of the arm.
            rate: peak learning rate of the run.
            rank: rank of the run.
            seed: seed of the run.
            recipe: recipe that fits the adapter.
        """
        self._store.add(finished(self._bench, Run(arm, rank, rate, seed), recipe))

    def curvature(self, arms: list[str], rank: int = 16, seed: int = 0) -> None:
        """Keep the largest eigenvalue of the Hessian at the start of each arm.

        Args:
            arms: names of arms.
            rank: rank of the starts.
            seed: seed of the fresh directions.
        """
        store = self._kept("curvature")
        for arm in arms:
            key = f"{arm}-r{rank}-s{seed}"
            if key not in store.done():
                value = curvature_of(self._bench, Run(arm, rank, seed=seed))
                store.add({"key": key, "arm": arm, "rank": rank, "eigenvalue": value})
                logger.warning("%s: %.4g", key, value)

    def tasks(self, arms: list[str], rank: int = 16, seed: int = 0, limit: int | None = 400) -> None:
        """Keep which items of PIQA, ARC-easy, BoolQ and COPA arms answer right, before training and after it.

        Args:
            arms: names of arms, whose best rate has been carried out.
            rank: rank that is trained.
            seed: seed of the runs.
            limit: number of items of each task, the first ones.
        """
        store = self._kept("tasks")
        for arm in arms:
            rate = best_rate(self._store.rows(), arm, rank)
            if rate is None:
                sys.exit(f"{arm} has no run of rank {rank} in {self._store.path}. Carry one out first, by `run`.")
            chosen = Run(arm, rank, rate, seed)
            for trained in (False, True):
                key = answer_key(chosen, trained=trained, limit=limit)
                if key not in store.done():
                    store.add(self._bench.answer(chosen, trained=trained, limit=limit))
                    logger.warning("%s done", key)

    def tokens(
        self,
        arms: list[str],
        windows: list[int] = [4, 16, 64, 256],  # noqa: B006 # not changed
        rank: int = 16,
    ) -> None:
        """Keep the scores before training of arms whose starts are calibrated on more and more windows.

        Args:
            arms: names of arms.
            windows: numbers of training windows to calibrate on.
            rank: rank of the starts.
        """
        store, protocol = self._kept("tokens"), self._bench.protocol
        for count, arm in product(windows, arms):
            key = f"{arm}-r{rank}-{count}"
            if key not in store.done():
                folder = self._bench.folder.parent / f"windows-{count}"
                bench = Bench(replace(protocol, calibration_windows=count), self._bench.texts, folder)
                run = Run(arm, rank)
                scores = bench.score(model_of(run, ARMS[arm], bench.start(run), protocol))
                store.add({"key": key, "arm": arm, "rank": rank, "tokens": count * protocol.length, "before": scores})
                logger.warning("%s done", key)

    def cost(self, rank: int = 16, steps: int = 12) -> None:
        """Keep seconds and memory of a training step with each start, measured in turn.

        Args:
            rank: rank that is trained.
            steps: steps of each.
        """
        store = self._kept("cost")
        for row in costs(self._bench, rank, steps):
            store.add(row)
            logger.warning("%s: %.2f s a step", row["key"], row["seconds"])

    def draw(self, page: Path = Path("docs/worth.md"), readme: Path = Path("README.md")) -> None:
        """Write the tables of the experiment into the documentation, and its plots beside the page.

        Args:
            page: the page that has all tables.
            readme: the page that has one in short.
        """
        draw_all(self._bench.protocol, page, readme)

    def _kept(self, kind: str = "") -> Store:
        return Store(self._bench.protocol, self._results, kind)

    def _of(self, *, families: bool) -> Store:
        """Return the store of the runs that compare families, or of those that compare starts of LoRA."""
        return self._kept("families") if families else self._store

    def _share(self, workers: int, hours: float, *, families: bool) -> None:
        """Let other processes carry out the queue."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        options = [f"--texts={self._bench.texts}", f"--protocol={self._bench.protocol.name}"]
        options += [f"--folder={self._bench.folder.parent}", f"--results={self._results}"]
        command = [sys.executable, "-m", "experiments", *options, "queue", f"--hours={hours}"]
        command += ["--families=true"] * families
        processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]
        failed = [process for process in processes if process.wait()]
        if failed:
            sys.exit(f"{len(failed)} of {workers} workers have failed; what is above says why.")


def left_of(bench: Bench, store: Store, *, families: bool = False) -> list[Run]:
    """Return the runs that are left for this device, most important first."""
    return outstanding(bench.protocol, store.rows(), device_name(), families=families)


def claim(bench: Bench, store: Store, *, families: bool = False) -> tuple[Run, FileLock] | None:
    """Return the first run that no other process is at, with the lock that keeps it; None if there is none now."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    for candidate in left_of(bench, store, families=families):
        if bench.waits(candidate):
            continue
        lock = FileLock(bench.folder / f"{candidate.key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if candidate.key in store.done():  # finished between reading and locking
            lock.release()
            return claim(bench, store, families=families)
        return candidate, lock
    return None
