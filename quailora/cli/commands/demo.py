"""`quailora demo`."""

from __future__ import annotations

from typing import Any

from ...support.choices import StrPath


def demo(out: StrPath | None = None) -> Any:
    """Initialize an adapter for SmolLM2-135M, and compare methods and ranks on text that ships with quailora.

    The uncalibrated SVD, QuAILoRA and the optimum on NF4, at ranks 16 and 64, with full precision and int8 beside them.
    Takes some minutes on two cores.

    Args:
        out: folder for the adapter and the comparison; nothing is kept by default.
    """
    from ..demo import demo as run

    return run(out)
