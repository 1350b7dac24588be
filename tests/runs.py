"""Small runs of `quailora init`, what they leave behind, and how they are ended."""

from __future__ import annotations

from helpers import init

SMALL = {"rank": 4, "samples": 8, "sequence_length": 32}


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def small_run(model, out, **options):
    """Run `init` on a few tokens."""
    return init(str(model), out=str(out), **SMALL | options)


def content(out):
    """Return the bytes of the files that make an adapter."""
    return b"".join((out / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
