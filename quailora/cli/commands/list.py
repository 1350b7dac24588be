"""`quailora list`."""

from __future__ import annotations

from typing import Any


def list_components() -> Any:
    """List the quantizers, solvers, metrics and recipes."""
    from ..listing import Components

    return Components()
