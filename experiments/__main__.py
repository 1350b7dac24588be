"""The commands of the experiment; `python -m experiments --help` lists them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from filelock import FileLock, Timeout
from jsonargparse import auto_cli

from .arms import ARMS
from .cost import cost_table
from .curvature import curvature_of
from .draw import draw_all
from .finishing import finished
from .plan import best_rate, outstanding
from .protocol import PROTOCOLS, CalibrationText, Run
from .runs import RESULTS, Bench, Store, answer_key
from .training import model_of

logger = logging.getLogger("experiments")

_PATIENCE = 5.0  # seconds between two looks for a start that another process makes


def run(
    arm: str,
    *,
    texts: Path,
    rank: int = 16,
    rate: float = 1.6e-3,
    seed: int = 0,
    calibration: CalibrationText = "train",
    curve: bool = False,
    protocol: str = "reference",
    folder: Path = Path("runs"),
) -> None:
    """Carry out one run and keep its result.

    Args:
        arm: name of the arm, see `experiments/arms.py`.
        texts: folder with the instruction pairs and the WikiText-2 test set.
        rank: rank that is trained.
        rate: peak learning rate.
        seed: seed of the order of the batches and of the fresh directions.
        calibration: the text that the start is calibrated on.
        curve: score the held-out pairs before and during training, too.
        protocol: reference, smoke or large.
        folder: folder for starts and trained adapters.
    """
    bench = Bench(PROTOCOLS[protocol], texts, folder)
    Store(bench.protocol).add(bench.carry_out(Run(arm, rank, rate, seed, calibration, curve)))


def queue(
    *,
    texts: Path,
    protocol: str = "reference",
    folder: Path = Path("runs"),
    workers: int = 1,
    hours: float = 1000.0,
    results: Path | None = None,
) -> None:
    """Carry out the runs that are left, most important first. Can be stopped at any time, and started again.

    Args:
        texts: folder with the instruction pairs, the WikiText-2 test set and the other calibration texts.
        protocol: reference, smoke or large.
        folder: folder for starts and trained adapters.
        workers: processes, each on its share of the cores. Two on two cores do 15 % more runs than one.
        hours: hours after which no further run is begun.
        results: folder of the results; experiments/results by default.
    """
    if workers > 1:
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        options = [f"--texts={texts}", f"--protocol={protocol}", f"--folder={folder}", f"--hours={hours}"]
        options += [f"--results={results}"] if results else []
        command = [sys.executable, "-m", "experiments", "queue", *options]
        processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]
        sys.exit(max(process.wait() for process in processes))
    bench = Bench(PROTOCOLS[protocol], texts, folder)
    store = Store(bench.protocol, results or RESULTS)
    end = time.monotonic() + 3600 * hours
    while time.monotonic() < end:
        chosen = claim(bench, store)
        if chosen is None:
            if not any(bench.waits(candidate) for candidate in outstanding(bench.protocol, store.rows(), store.done())):
                return
            time.sleep(_PATIENCE)
            continue
        one, lock = chosen
        began = time.monotonic()
        try:
            row = bench.carry_out(one)
            store.add(row)
        finally:
            lock.release()
        loss = sum(row["after"]["all"]) / len(row["after"]["all"])
        logger.warning("%s: %.4f nats a token on held-out pairs, %.0f s", one.key, loss, time.monotonic() - began)


def claim(bench: Bench, store: Store) -> tuple[Run, FileLock] | None:
    """Return the first run that no other process is at, with the lock that keeps it; None if there is none now."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    for candidate in outstanding(bench.protocol, store.rows(), store.done()):
        if bench.waits(candidate):
            continue
        lock = FileLock(bench.folder / f"{candidate.key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if candidate.key in store.done():  # finished between reading and locking
            lock.release()
            return claim(bench, store)
        return candidate, lock
    return None


def finish(
    arm: str,
    *,
    texts: Path,
    rate: float,
    rank: int = 16,
    seed: int = 0,
    recipe: str = "best",
    protocol: str = "reference",
    folder: Path = Path("runs"),
    results: Path | None = None,
) -> None:
    """Fit the trained adapter of a run again by `quailora.finish`, and keep its scores.

    Args:
        arm: name of the arm.
        texts: folder with the texts.
        rate: peak learning rate of the run.
        rank: rank of the run.
        seed: seed of the run.
        recipe: recipe that fits the adapter.
        protocol: reference, smoke or large.
        folder: folder with starts and trained adapters.
        results: folder of the results; experiments/results by default.
    """
    bench = Bench(PROTOCOLS[protocol], texts, folder)
    store = Store(bench.protocol, results or RESULTS)
    store.add(finished(bench, Run(arm, rank, rate, seed), recipe))


def curvature(
    arms: list[str],
    *,
    texts: Path,
    rank: int = 16,
    seed: int = 0,
    protocol: str = "reference",
    folder: Path = Path("runs"),
    results: Path | None = None,
) -> None:
    """Keep the largest eigenvalue of the Hessian at the start of each arm.

    Args:
        arms: names of arms.
        texts: folder with the texts.
        rank: rank of the starts.
        seed: seed of the fresh directions.
        protocol: reference, smoke or large.
        folder: folder with starts and trained adapters.
        results: folder of the results; experiments/results by default.
    """
    bench = Bench(PROTOCOLS[protocol], texts, folder)
    store = Store(bench.protocol, results or RESULTS, "curvature")
    for arm in arms:
        key = f"{arm}-r{rank}-s{seed}"
        if key in store.done():
            continue
        value = curvature_of(bench, Run(arm, rank, seed=seed))
        store.add({"key": key, "arm": arm, "rank": rank, "eigenvalue": value})
        logger.warning("%s: %.4g", key, value)


def tasks(
    arms: list[str],
    *,
    texts: Path,
    rank: int = 16,
    seed: int = 0,
    limit: int | None = 400,
    protocol: str = "reference",
    folder: Path = Path("runs"),
    results: Path | None = None,
) -> None:
    """Keep which items of PIQA, ARC-easy, BoolQ and COPA arms answer right, before training and after it.

    Args:
        arms: names of arms, whose best rate has been carried out.
        texts: folder with the texts and the tasks.
        rank: rank that is trained.
        seed: seed of the runs.
        limit: number of items of each task, the first ones.
        protocol: reference, smoke or large.
        folder: folder with starts and trained adapters.
        results: folder of the results; experiments/results by default.
    """
    bench = Bench(PROTOCOLS[protocol], texts, folder)
    store, kept = Store(bench.protocol, results or RESULTS), Store(bench.protocol, results or RESULTS, "tasks")
    for arm in arms:
        rate = best_rate(store.rows(), arm, rank)
        if rate is None:
            sys.exit(f"{arm} has no run of rank {rank} in {store.path}. Carry one out first: experiments run {arm}.")
        chosen = Run(arm, rank, rate, seed)
        for trained in (False, True):
            key = answer_key(chosen, trained=trained, limit=limit)
            if key not in kept.done():
                kept.add(bench.answer(chosen, trained=trained, limit=limit))
                logger.warning("%s done", key)


def tokens(
    arms: list[str],
    *,
    texts: Path,
    windows: list[int] = [4, 16, 64, 256],  # noqa: B006 # not changed
    rank: int = 16,
    protocol: str = "reference",
    folder: Path = Path("runs"),
    results: Path | None = None,
) -> None:
    """Keep the scores before training of arms whose starts are calibrated on more and more windows.

    Args:
        arms: names of arms.
        texts: folder with the texts.
        windows: numbers of training windows to calibrate on.
        rank: rank of the starts.
        protocol: reference, smoke or large.
        folder: folder for starts.
        results: folder of the results; experiments/results by default.
    """
    chosen = PROTOCOLS[protocol]
    store = Store(chosen, results or RESULTS, "tokens")
    for count, arm in product(windows, arms):
        key = f"{arm}-r{rank}-{count}"
        if key in store.done():
            continue
        bench = Bench(replace(chosen, calibration_windows=count), texts, folder / f"windows-{count}")
        run = Run(arm, rank)
        scores = bench.score(model_of(run, ARMS[arm], bench.start(run), chosen))
        store.add({"key": key, "arm": arm, "rank": rank, "tokens": count * chosen.length, "before": scores})
        logger.warning("%s done", key)


def cost(
    *, texts: Path, rank: int = 16, steps: int = 12, protocol: str = "reference", folder: Path = Path("runs")
) -> None:
    """Print seconds and memory of a training step with each start, measured in turn.

    Args:
        texts: folder with the texts.
        rank: rank that is trained.
        steps: steps of each.
        protocol: reference, smoke or large.
        folder: folder with starts.
    """
    print(cost_table(Bench(PROTOCOLS[protocol], texts, folder), rank, steps))


def left(protocol: str = "reference") -> None:
    """Print the runs that are left, most important first.

    Args:
        protocol: reference, smoke or large.
    """
    store = Store(PROTOCOLS[protocol])
    for candidate in outstanding(PROTOCOLS[protocol], store.rows(), store.done()):
        print(candidate.key)


def draw(page: Path = Path("docs/worth.md"), readme: Path = Path("README.md")) -> None:
    """Write the tables of the reference experiment into the documentation, and its plots beside the page.

    Args:
        page: the page that has all tables.
        readme: the page that has one in short.
    """
    draw_all(PROTOCOLS["reference"], page, readme)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a GPU its layers of 8 bits warn at every pass
    auto_cli([run, queue, finish, curvature, tasks, tokens, cost, left, draw], as_positional=False)
