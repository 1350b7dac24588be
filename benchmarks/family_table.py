"""The table of docs/families.md, from the folder of a comparison of families, in the order of their KL.

    quailora compare demo --out COMPARISON --recipes qera-exact --families all --ranks 16 --against qera-exact \
        --baselines int8 --calibration wikitext2_valid.txt --text wikitext2_raw_test.txt c4_300.jsonl \
        --windows 8 --window-length 1024
    python benchmarks/family_table.py COMPARISON --keep experiments/results/families.json
    python benchmarks/family_table.py experiments/results/families.json

The same command with `--equal bytes --families shira randlora` adds the families whose numbers are not their bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np

from quailora.evaluation.scores import perplexity_of
from quailora.families import Family, Lora
from quailora.support.settings import build
from quailora.support.tables import markdown_table

_RESAMPLES = 4000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder of a comparison, or a file that was kept of one")
    parser.add_argument("--keep", type=Path, help="file to keep what the table needs")
    asked = parser.parse_args()
    file = asked.comparison / "results.json" if asked.comparison.is_dir() else asked.comparison
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    if asked.keep is not None:
        asked.keep.write_text(json.dumps({"rows": [kept(row) for row in rows]}) + "\n", encoding="utf-8")
    by_name = {row["name"]: row for row in rows}
    texts = list(by_name["base alone"]["scores"])
    base = by_name["base alone"]
    lines = [
        [
            "NF4 alone",
            *[""] * 4,
            *(
                cell
                for text in texts
                for cell in (f"{perplexity(base, text):.2f}", f"{divergence(base, text):.4f}", "")
            ),
        ]
    ]
    for row in sorted((row for row in rows if row["recipe"]), key=lambda row: divergence(row, texts[0])):
        layers = row["layers"]
        closed = [
            fmean(1 - layer[part] / layer["error_none"] for layer in layers) for part in ("error_uncalibrated", "error")
        ]
        worse = [
            layer["name"]
            for layer in layers
            if not layer["error"] <= layer["error_uncalibrated"] * 1.001 <= layer["error_none"] * 1.002
        ]
        title = " ".join(row["name"].split()[2:]) or f"lora {row['rank']}"
        trained, size = sizes(row)
        cells = [title + f" ({len(worse)} layers break the law)" * bool(worse), f"{trained:,}", f"{size / 1e6:.1f}"]
        cells += [f"{share:.1%}" for share in closed]
        for text in texts:
            cells += [f"{perplexity(row, text):.2f}", f"{divergence(row, text):.4f}", cut(row, base, text)]
        lines.append(cells)
    head = ["family", "trained", "MB", "error closed, without inputs", "calibrated"]
    head += [f"{what} on {text}" for text in texts for what in ("perplexity", "KL", "KL cut")]
    print(markdown_table(head, lines))


def kept(row: dict) -> dict:
    """Return what the table needs of a row, with numbers of six digits."""
    errors = ("error_none", "error_uncalibrated", "error")
    layers = [
        {"name": layer["name"], "shape": layer["shape"]} | {error: float(f"{layer[error]:.5e}") for error in errors}
        for layer in row["layers"]
        if row["recipe"]
    ]
    scores = {
        text: {what: [float(f"{value:.5e}") for value in values] for what, values in score.items()}
        for text, score in row["scores"].items()
    }
    return {name: row[name] for name in ("name", "recipe", "rank", "family", "size")} | {
        "scores": scores,
        "layers": layers,
    }


def sizes(row: dict) -> tuple[int, int]:
    """Return how many numbers of an adapter are trained, and how many bytes its file has in float32."""
    family = Lora() if row["family"] is None else build(Family, row["family"])
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in row["layers"]}
    trained = sum(family.count(shape, row["size"]) for shape in shapes.values())
    numbers = sum(family.numbers(shape, row["size"]) for shape in shapes.values())
    return trained, 4 * (numbers + family.shared_numbers(shapes, row["size"]))


def perplexity(row: dict, text: str) -> float:
    """Return the perplexity of a row."""
    return perplexity_of(row["scores"][text]["losses"])


def divergence(row: dict, text: str) -> float:
    """Return the mean divergence from full precision, in nats a token."""
    return fmean(row["scores"][text]["divergences"])


def cut(row: dict, base: dict, text: str) -> str:
    """Return the share of the divergence of the base that is gone, with a bootstrap over windows, which are paired."""
    own, plain = (np.array(each["scores"][text]["divergences"]) for each in (row, base))
    drawn = np.random.default_rng(0).integers(len(own), size=(_RESAMPLES, len(own)))
    low, high = np.quantile(1 - own[drawn].mean(1) / plain[drawn].mean(1), [0.025, 0.975])
    return f"{1 - own.mean() / plain.mean():.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
