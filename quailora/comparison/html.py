"""One HTML file with the tables and plots of a comparison, which needs no network."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..layer.record import by_ending
from .table import MARKS, Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#123456"  # stands for the colour of text, which follows the reader's light or dark theme
_WIDE, _TALL, _LINE = 9.0, 4.8, 0.22  # inches: a picture, and a line of its legend

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid; } td { border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
svg { width: 100%; min-width: 42rem; height: auto; }
p { max-width: 45rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 0.9rem; overflow-wrap: anywhere; }
dd { margin: 0; }
"""

_PLOT = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quailora",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "sans-serif",
    "legend.frameon": False,
}


def report(comparison: Comparison) -> str:
    """Return the whole page; plots are left out, with a line that says so, where matplotlib is not installed."""
    text = comparison.texts[0]
    parts = [f"<h1>{escape(comparison.title)}</h1>", origin(comparison)]
    parts.append(
        "<p>Perplexity: of the text. KL: mean over tokens of the divergence from full precision, in nats; the recipe "
        "with the least is in bold. Gap closed: of the perplexity lost from int8 to the base alone. Loss less that of "
        f"{escape(comparison.reference)} at the same rank, in nats a token, with the 95 % confidence interval of the "
        "paired differences over windows: below zero is better. MB: stored bytes of the linear layers with their "
        "adapters in 16 bits. Seconds: calibration and initialization; what rows share counts for the first of them. "
        f"{escape(MARKS)}</p>"
    )
    for name in comparison.texts:
        parts += [f"<h2>On {escape(name)}</h2>", html_table(comparison, name)]
    parts += plots(comparison, text)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(comparison.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def origin(comparison: Comparison) -> str:
    """Return the list of command, date and versions that made a comparison; an empty text where they are not known."""
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in comparison.origin.items()]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def html_table(comparison: Comparison, text: str) -> str:
    """Return the table for one text, the recipe with the least KL in bold."""
    header, rows = comparison.table(text)
    best = comparison.closest(text)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row, cells in zip(comparison.rows, rows, strict=True):
        mark = ' class="best"' if row is best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def plots(comparison: Comparison, text: str) -> Iterator[str]:
    """Yield a heading, a picture and a line about it for each plot."""
    try:
        import matplotlib as mpl
    except ImportError:
        yield "<p>Plots need matplotlib: pip install 'quailora[report]'.</p>"
        return
    recipes = [row for row in comparison.rows if row.recipe]
    highest = max((row.rank for row in recipes), default=0)
    shown = [row for row in recipes if row.rank == highest]
    pictures: list[tuple[str, str, Callable[[Axes], None]]] = [
        (
            f"Perplexity on {text} against bytes",
            "An adapter has to lie below the line of bases alone, where its bytes are spent on more bits.",
            lambda axes: draw_sizes(axes, comparison, text),
        ),
        (
            f"Output error by kind of layer, rank {highest}",
            "Geometric mean over layers of the output error as a share of the output's energy.",
            lambda axes: draw_kinds(axes, shown),
        ),
        (
            f"Output error along the model, rank {highest}",
            "Mean over a block's layers of the output error as a share of the output's energy.",
            lambda axes: draw_blocks(axes, shown),
        ),
        (
            f"Captured energy, rank {highest}",
            "Mean over layers of the share of the output error that the first directions of the correction remove.",
            lambda axes: draw_spectra(axes, shown),
        ),
        (
            "Seconds",
            "Calibration and initialization; what rows share counts for the first of them.",
            lambda axes: draw_seconds(axes, shown),
        ),
    ]
    if len({row.rank for row in recipes}) > 1:
        pictures.insert(
            2,
            (
                "Output error against rank",
                "Mean over layers of the output error as a share of the output's energy.",
                lambda axes: draw_ranks(axes, recipes),
            ),
        )
    with mpl.rc_context(_PLOT):
        for title, caption, draw in pictures:
            drawn = f'<div class="wide">{picture(draw, title)}</div>'
            yield f"<h2>{escape(title)}</h2>\n{drawn}\n<p>{escape(caption)}</p>"


def picture(draw: Callable[[Axes], None], title: str) -> str:
    """Return a drawing as inline SVG in the colours of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE, _TALL), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    entries = max(len(axes.get_legend_handles_labels()[1]), len(axes.patches))
    figure.set_figheight(max(_TALL, _LINE * (entries + 4)))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # matplotlib gives every figure the same ids. A prefix makes them unique on the page, and colours of text become
    # that of the page, which follows the reader's light or dark theme.
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())  # ids of several pictures on one page
    drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def draw_sizes(axes: Axes, comparison: Comparison, text: str) -> None:
    """Draw perplexity against stored bytes."""
    # The grey line joins those bases alone that no smaller one beats: what the same bytes give without any adapter.
    alone = sorted((row.base_bytes / 1e6, row.scores[text].perplexity) for row in comparison.rows if is_alone(row))
    reached = [row.scores[text].perplexity for row in comparison.rows if row.recipe]
    worst = max(filter(math.isfinite, reached), default=0.0)
    worth = [point for index, point in enumerate(alone) if all(point[1] < smaller[1] for smaller in alone[:index])]
    axes.plot(*zip(*alone, strict=True), "o", color="grey", label="bases alone")
    axes.plot(*zip(*worth, strict=True), color="grey")
    recipes = [row for row in comparison.rows if row.recipe]
    for index, recipe in enumerate(dict.fromkeys(row.recipe for row in recipes)):
        points = [
            ((row.base_bytes + row.adapter_bytes) / 1e6, row.scores[text].perplexity)
            for row in recipes
            if row.recipe == recipe
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker(index) + "-", label=recipe, linewidth=0.8)
    full = comparison.rows[0].scores[text].perplexity
    axes.axhline(full, linestyle=":", color=_INK)
    axes.set(xlabel="MB", ylabel="perplexity")
    if full < worst:
        axes.set_ylim(full - 0.05 * (worst - full), worst + 0.1 * (worst - full))
    legend(axes)


def draw_kinds(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the error by kind of layer."""
    for index, row in enumerate(rows):
        kinds = {
            kind: geometric_mean([max(layer.relative_error, 1e-12) for layer in layers])
            for kind, layers in by_ending(row.layers).items()
        }
        axes.plot(list(kinds), list(kinds.values()), marker(index) + "-", label=row.name, linewidth=0.8)
    axes.set(yscale="log", ylabel="relative output error")
    axes.tick_params(axis="x", rotation=30)
    legend(axes)


def draw_blocks(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the error along the model."""
    for index, row in enumerate(rows):
        blocks: dict[int, list[float]] = {}
        for layer in row.layers:
            # The first number in the name of a layer is that of its block; layers outside of all blocks come first.
            number = re.search(r"\.(\d+)\.", layer.name)
            blocks.setdefault(int(number.group(1)) if number else -1, []).append(layer.relative_error)
        means = [sum(errors) / len(errors) for errors in blocks.values()]
        axes.plot(list(blocks), means, marker(index) + "-", label=row.name, linewidth=0.8, markersize=3)
    axes.set(yscale="log", xlabel="block", ylabel="relative output error")
    legend(axes)


def draw_ranks(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the error against the rank, one line a recipe."""
    for index, recipe in enumerate(dict.fromkeys(row.recipe for row in rows)):
        points = sorted((row.rank, row.mean_relative_error) for row in rows if row.recipe == recipe)
        axes.plot(*zip(*points, strict=True), marker(index) + "-", label=recipe)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="relative output error")
    legend(axes)


def draw_spectra(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the share of the error removed against the number of directions."""
    for index, row in enumerate(row for row in rows if row.spectrum):
        axes.plot(range(1, len(row.spectrum) + 1), row.spectrum, marker(index) + "-", label=row.name, linewidth=0.8)
    axes.set(xlabel="directions", ylabel="share of the error removed")
    legend(axes)


def draw_seconds(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the seconds that each recipe took."""
    axes.barh([row.name for row in rows], [row.seconds for row in rows], color="grey")
    axes.invert_yaxis()
    axes.set(xlabel="seconds")


def is_alone(row: Row) -> bool:
    """Return whether a row is a base without an adapter."""
    return not row.recipe and bool(row.layers)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive values."""
    from scipy.stats import gmean

    return float(gmean(values))


def marker(index: int) -> str:
    """Return a marker for the curve of this number; matplotlib repeats its colours after ten."""
    return "osD^vP*X"[index // 10 % 8]


def legend(axes: Axes) -> None:
    """Put the legend beside the plot, if there is anything in it."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
