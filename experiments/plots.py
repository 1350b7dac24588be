"""Plots of the experiment, as SVG, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from .arms import ARMS
from .plan import Results
from .tables import at_best, chosen, curve_of, gap_of, mean, most_run

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "quailora", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_SIZE = (7.0, 3.8)


def draw_rates(results: Results, rank: int, arms: Sequence[str], file: Path) -> None:
    """Draw the loss on the held-out pairs after training against the learning rate, on the device with most runs."""
    shown = most_run(results, rank)
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
        for arm in arms:
            rates = sorted({row["rate"] for row in results if row["arm"] == arm and row["rank"] == rank})
            points = [(rate, chosen(results, arm, rank, rate)) for rate in rates]
            points = [(rate, mean([rows[shown]], "all")) for rate, rows in points if shown in rows]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=plain(arm))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="peak learning rate", ylabel="held-out loss after training, nats a token")
        rates = sorted({row["rate"] for row in results if row["rank"] == rank})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.legend()
        save(figure, file)


def draw_curves(results: Results, rank: int, arms: Sequence[str], file: Path) -> None:
    """Draw the loss on the held-out pairs during training, mean over the runs that have a curve."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
        for arm in arms:
            rows = [row for row in at_best(results, arm, rank).values() if row["training"]["curve"]]
            if rows:
                curves = [curve_of(row) for row in rows]
                steps = [step for step, _ in curves[0]]
                means = [sum(curve[index][1] for curve in curves) / len(curves) for index in range(len(steps))]
                axes.plot(steps, means, marker="o", markersize=3, label=plain(arm))
        axes.set(xlabel="step", ylabel="held-out loss, nats a token")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        save(figure, file)


def draw_ranks(results: Results, ranks: Sequence[int], arms: Sequence[str], file: Path) -> None:
    """Draw the share of the gap from NF4 to int8 that arms close, against the rank."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
        for index, arm in enumerate(arms):
            shares = [(rank, gap_of(results, arm, rank)) for rank in ranks]
            known = [(rank * 1.03**index, share) for rank, share in shares if share is not None]
            if known:
                values = [share.value for _, share in known]
                ends = [
                    [share.value - share.low for _, share in known],
                    [share.high - share.value for _, share in known],
                ]
                axes.errorbar([rank for rank, _ in known], values, ends, marker="o", capsize=3, label=plain(arm))
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ranks), [str(rank) for rank in ranks])
        axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        axes.set(xlabel="rank", ylabel="gap closed after training")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        save(figure, file)


def plain(arm: str) -> str:
    """Return the title of an arm without Markdown."""
    return ARMS[arm].title.replace("`", "")


def save(figure: plt.Figure, file: Path) -> None:
    """Write a figure so that the same results give the same file."""
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
