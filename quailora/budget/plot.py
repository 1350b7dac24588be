"""The frontier of a model as a plot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..support.files import complete_file
from .planning import Point

logger = logging.getLogger("quailora")


def plot_frontier(points: Sequence[Point], model: str, file: Path) -> bool:
    """Write what budgets buy as an SVG file; return whether matplotlib, which draws it, is installed.

    Args:
        points: the budgets.
        model: the model, for the title.
        file: the file to write.

    Raises:
        StorageError: if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("The plot needs matplotlib: pip install 'quailora[report]'.")
        return False
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    curves = {
        "plan": [(point.bits, point.plan) for point in points],
        "best uniform choice": [(point.bits, point.uniform) for point in points if point.uniform is not None],
        "16-bit skips alone": [(point.bits, point.skipping) for point in points if point.skipping is not None],
    }
    for label, curve in curves.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=label)
    axes.set(
        title=f"{model}: expected divergence from full precision",
        xlabel="bits a weight, adapters included",
        ylabel="nats per token",
        yscale="log",
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with complete_file(file) as partial:
        figure.savefig(partial, format="svg")
    return True
