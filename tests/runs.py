"""Small runs of `quailora init`, what they leave behind, and how they are ended."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from helpers import init

from quailora.pipeline.checkpoint import Checkpoint
from quailora.support.files import write_tensors

SMALL = {"rank": 4, "samples": 8, "sequence_length": 32}


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def small_run(model, out, **options):
    """Run `init` on a few tokens."""
    return init(str(model), out=str(out), **SMALL | options)


def content(out):
    """Return the bytes of the files that make an adapter."""
    return b"".join((out / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


@contextmanager
def stopped_after_a_block(monkeypatch):
    """Let a run end when its first block is done."""
    done = Checkpoint.set_blocks_done

    def stop(checkpoint, blocks):
        done(checkpoint, blocks)
        if blocks == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "set_blocks_done", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def killed_after(writes, monkeypatch):
    """Let a run end after so many files of its state."""
    left = [writes]

    def counted(*arguments):
        write_tensors(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patch:
        for module in ("pipeline.checkpoint", "calibration.activations"):
            patch.setattr(f"quailora.{module}.write_tensors", counted)
        with pytest.raises(Killed):
            yield
