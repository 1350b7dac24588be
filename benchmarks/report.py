"""From the JSON of `make bench` to the tables and the plot of docs/performance.md.

    python benchmarks/report.py benchmarks/results.json docs/performance.md docs/growth.svg

Replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Times are the fastest of their rounds.
`make bench-calls` fills in the table of whole calls alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from jsonargparse import auto_cli

from quailora.support.tables import markdown_table


class Results:
    """What was measured, by test name and the values recorded beside it."""

    def __init__(self, path: str) -> None:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        self.machine = content["machine_info"]
        self.rows = [
            {
                "name": row["name"],
                "test": row["name"].split("[")[0],
                "seconds": row["stats"]["min"],
                **row["extra_info"],
            }
            for row in content["benchmarks"]
        ]

    def all(self, test: str, part: str = "") -> list[dict]:
        return [row for row in self.rows if row["test"] == test and part in row["name"]]

    def one(self, test: str, part: str = "", **values) -> dict | None:
        found = [row for row in self.all(test, part) if all(row.get(key) == value for key, value in values.items())]
        return found[0] if found else None

    def rate(self, shape: list[int]) -> float:
        """Floating-point operations a second of a square float32 product as wide as the layer's shorter side."""
        found = self.one("test_matmul", shape=shape)
        return found["work"] / found["seconds"]


def size(shape: list[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def seconds(row: dict | None) -> str:
    return f"{row['seconds']:.3g}" if row else ""


def ratio(baseline: dict | None, row: dict) -> str:
    return f"{baseline['seconds'] / row['seconds']:.1f}x" if baseline else ""


def percent(value: float | None) -> str:
    return f"{value:.3%}" if value is not None else ""


def machine(results: Results) -> str:
    cpu = results.machine["cpu"].get("brand_raw", results.machine["machine"])
    rates = {row["shape"][0]: row["work"] / row["seconds"] / 1e9 for row in results.all("test_matmul")}
    products = ", ".join(f"{rate:.0f} at {side}" for side, rate in rates.items())
    return (
        f"{cpu}, {results.machine['threads']} threads, {results.machine['vectors']}, torch {results.machine['torch']}. "
        f"Square float32 products, GFLOP/s: {products}."
    )


def calls(results: Results) -> str:
    header = ("layer", "full SVD of E, s", "`Optimal().solve`, s", "of full SVD", "and its `error` read, s",
              "of full SVD")  # fmt: skip
    rows = []
    for alone in results.all("test_whole_call"):
        if alone["reading"]:
            continue
        svd = results.one("test_full_svd", shape=alone["shape"])
        read = results.one("test_whole_call", shape=alone["shape"], reading=True)
        rows.append([size(alone["shape"]), seconds(svd), seconds(alone), ratio(svd, alone), seconds(read),
                     ratio(svd, read)])  # fmt: skip
    return markdown_table(header, rows)


def calibrated(results: Results) -> str:
    header = ("layer", "rank", "full SVD of E, s", "exact route, s", "ALS 20 rounds, s", "`Optimal`, s",
              "of full SVD", "of exact route", "floor, s", "time / floor", "gain reached", "ALS reaches",
              "measuring `tr(E H E^T)`, s")  # fmt: skip
    rows = []
    for best in results.all("test_solver", "Optimal"):
        shape, rank = best["shape"], best["rank"]
        svd, exact = results.one("test_full_svd", shape=shape), results.one("test_exact_route", shape=shape)
        als = results.one("test_solver", "Alternating", shape=shape, rank=rank)
        floor = best["work"] / results.rate(shape) if best["work"] else None
        over = (f"{floor:.3g}", f"{best['seconds'] / floor:.1f}") if floor else ("dense", "")
        measured = results.one("test_value_at_zero", shape=shape)
        rows.append([size(shape), str(rank), seconds(svd), seconds(exact), seconds(als), seconds(best),
                     ratio(svd, best), ratio(exact, best), *over, percent(best["captured"]),
                     percent(als["captured"]), seconds(measured)])  # fmt: skip
    return markdown_table(header, rows)


def uncalibrated(results: Results) -> str:
    header = ("layer", "rank", "full SVD, s", "`torch.svd_lowrank`, s", "`SVD`, s", "of full SVD", "gain reached",
              "`svd_lowrank` reaches")  # fmt: skip
    rows = []
    for ours in results.all("test_solver", "SVD"):
        shape, rank = ours["shape"], ours["rank"]
        svd, low = results.one("test_full_svd", shape=shape), results.one("test_svd_lowrank", shape=shape, rank=rank)
        rows.append([size(shape), str(rank), seconds(svd), seconds(low), seconds(ours), ratio(svd, ours),
                     percent(ours["captured"]), percent(low["captured"])])  # fmt: skip
    return markdown_table(header, rows)


def quantizers(results: Results) -> str:
    header = ("layer", "`NF4`, s", "`Int8`, s", "`Uniform`, s", "`GPTQ`, s", "with the factor shared, s",
              "AutoGPTQ's class, s", "error, AutoGPTQ / ours")  # fmt: skip
    rows = []
    for alone in results.all("test_gptq", "alone"):
        shape = alone["shape"]
        shared, theirs = results.one("test_gptq", "shared", shape=shape), results.one("test_auto_gptq", shape=shape)
        plain = [seconds(results.one("test_quantizer", name, shape=shape)) for name in ("NF4", "Int8", "Uniform")]
        error = f"{theirs['relative_error'] / alone['relative_error']:.4f}" if theirs else ""
        rows.append([size(shape), *plain, seconds(alone), seconds(shared), seconds(theirs), error])
    return markdown_table(header, rows)


def statistics(results: Results) -> str:
    rows = [
        [str(row["width"]), str(row["tokens"]), seconds(row), f"{row['work'] / row['seconds'] / 1e9:.0f}"]
        for row in results.all("test_statistics")
    ]
    return markdown_table(("width", "tokens", "seconds", "GFLOP/s of a symmetric product"), rows)


def plot(results: Results, path: str) -> None:
    """Draw time against width, rank and tokens."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quailora"
    from matplotlib import pyplot as plt

    figure, (by_width, by_rank, by_tokens) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    square = [row["shape"] for row in results.all("test_full_svd") if row["shape"][0] == row["shape"][1]]
    lines = {
        "full SVD": [results.one("test_full_svd", shape=shape) for shape in square],
        "exact route": [results.one("test_exact_route", shape=shape) for shape in square],
        "ALS, 20 rounds": [results.one("test_solver", "Alternating", shape=shape, rank=64) for shape in square],
        "Optimal": [results.one("test_solver", "Optimal", shape=shape, rank=64) for shape in square],
    }
    for label, found in lines.items():
        by_width.loglog([shape[0] for shape in square], [row["seconds"] for row in found], "o-", label=label)
    by_width.set(xlabel="width of a square layer", ylabel="seconds", title="rank 64")
    for shape in ([2048, 2048], [4096, 4096]):
        for solver in ("Optimal", "SVD"):
            found = [row for row in results.all("test_solver", solver) if row["shape"] == shape]
            by_rank.loglog([row["rank"] for row in found], [row["seconds"] for row in found], "o-",
                           label=f"{solver}, {size(shape)}")  # fmt: skip
    by_rank.set(xlabel="rank", title="calibrated and uncalibrated")
    for width in (576, 2048, 4096):
        found = [row for row in results.all("test_statistics") if row["width"] == width]
        times = [row["seconds"] for row in found]
        by_tokens.loglog([row["tokens"] for row in found], times, "o-", label=f"width {width}")
    by_tokens.set(xlabel="tokens", title="statistics of one input")
    widths = [shape[0] for shape in square]
    tokens = sorted({row["tokens"] for row in results.all("test_statistics")})
    ranks = sorted({row["rank"] for row in results.all("test_solver")})
    for axes, values in ((by_width, widths), (by_rank, ranks), (by_tokens, tokens)):
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main(results: str, page: str, figure: str | None = None, only: list[str] | None = None) -> None:
    """Fill in the tables of a page.

    Args:
        results: JSON of pytest-benchmark.
        page: Markdown page with markers.
        figure: where the plot goes; none is drawn if it is missing.
        only: names of the tables to fill in; all of them if it is missing.
    """
    measured = Results(results)
    tables = {"machine": machine, "calls-machine": machine, "calls": calls, "calibrated": calibrated,
              "uncalibrated": uncalibrated, "quantizers": quantizers, "statistics": statistics}  # fmt: skip
    text = Path(page).read_text(encoding="utf-8")
    for name in only or tables:
        between = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not between.search(text):
            raise SystemExit(f"Expected the markers of {name!r} in {page}.")
        content = tables[name](measured)
        text = between.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
    Path(page).write_text(text, encoding="utf-8")
    if figure is not None:
        plot(measured, figure)


if __name__ == "__main__":
    auto_cli(main)
