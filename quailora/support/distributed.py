"""Sums and gathers over the processes that `torchrun` started.

In a single process they return what they were given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DistributedError
from .machine import cores

Item = TypeVar("Item")

_PATIENCE = timedelta(hours=2)  # a rank with slow layers keeps the others waiting; a dead one is noticed at once


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did, for the body of a `with` statement.

    Cores are divided among the processes of a host, and each gets a GPU of its own where they compute on GPUs.

    Args:
        device: kind of device that the processes compute on, "cpu" or "cuda".

    Raises:
        DistributedError: if a host has fewer GPUs than processes, or another process dies.
    """
    if not join(device):
        yield
        return
    torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and "NCCL" not in str(error) and "Connection" not in str(error):
            raise
        raise DistributedError(
            f"Process {rank()} lost another process ({str(error).splitlines()[0]}). Its own messages say why it ended. "
            "What is finished is kept: run the same command again to go on."
        ) from error
    finally:
        dist.destroy_process_group()


def join(device: str) -> bool:
    """Join the processes that `torchrun` started, and stay joined; see `process_group`.

    A process that leaves its group and joins another one later, as a trainer does, can wait for ever: the second group
    finds the addresses of the first one.

    Returns:
        Whether they were joined here: not in a single process, and not if this one was joined before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if local > gpus:
            raise DistributedError(
                f"Expected at most one process for each GPU of a host, got {local} processes and {gpus} of them. "
                f"Try torchrun --nproc-per-node {gpus}, or `device='cpu'`."
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Sums of statistics are on the devices and go over NCCL; names, layers and barriers are on the processors and go
    # over Gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    return True


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(item: Item) -> list[Item]:
    """Return what every process passed, in order of their numbers."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first(item: Item) -> Item:
    """Return what the first process passed."""
    return gather(item)[0]


def barrier() -> None:
    """Wait until every process has called this function."""
    gather(None)


def packed(costs: Mapping[str, float]) -> list[str]:
    """Return this process's share of the work.

    Items are given out from the most expensive to the cheapest, each to the process that has the least work so far.
    Every process computes the same shares, so that none has to communicate.
    """
    # The greedy rule for scheduling on equal machines (largest first), whose longest load is at most a third above the
    # best possible one. Ties are broken by name, so that every process computes the same shares.
    loads = [0.0] * world_size()
    mine = []
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        if least == rank():
            mine.append(name)
    return mine
