"""What each family of adapters closes of the error of every layer of SmolLM2, on calibration text and on other text.

    python benchmarks/family_layers.py TEXT OTHER_TEXT --families lora dora --out family_layers.json

Families are about as large as LoRA of rank 16. Results of families that are in the file already stay there.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from filelock import FileLock

from quailora import FAMILIES, NF4, Calibration, TextSource
from quailora.calibration.walk import collect_statistics
from quailora.comparison.sizes import of_size
from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.families import Shira
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.schedules.layer import QuantizedLayer
from quailora.support.tables import markdown_table

MEASURED = {**FAMILIES, "shira-adaalloc": partial(Shira, "adaalloc")}
"""What makes each family, by its name on the command line."""


def main() -> None:
    """Measure the families that are asked for, and print the table of all in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("other")
    parser.add_argument("--families", nargs="+", default=list(MEASURED))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("family_layers.json"))
    asked = parser.parse_args()
    done = read(asked.out)
    missing = [name for name in asked.families if name not in done]
    if missing:
        measure(asked, missing)
    print(table(read(asked.out)))


def read(file: Path) -> dict[str, dict[str, object]]:
    """Return the results in a file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@torch.no_grad()
def measure(asked: argparse.Namespace, names: list[str]) -> None:
    """Fit each family to every layer, and add what it closes to the file."""
    loaded = load_model("demo", "float32", asked.device)
    layers = {name: layer for name, layer in linear_layers(loaded.model).items() if name != "lm_head"}
    texts = []
    for source, seed, samples in ((asked.text, 0, 16), (asked.other, 1, 4)):
        windows = Calibration(TextSource(source), samples, 1024, seed).windows(loaded.tokenizer)
        texts.append(collect_statistics(loaded.model, layers, windows))
    for name in names:
        sized = of_size(MEASURED[name](), asked.rank, layers, "numbers")
        begun, rows = time.perf_counter(), {}
        for layer_name, layer in layers.items():
            quantized = QuantizedLayer.of(NF4(), layer.weight, texts[0][layer_name])
            objective, moments = quantized.objective, texts[1][layer_name]
            fit = sized.family.fit(objective, sized.rank)
            uncalibrated = fit.error_uncalibrated
            if uncalibrated is None:
                uncalibrated = sized.family.uncalibrated(objective, sized.rank).error
            other = Objective(objective.error, gram(moments), mean=moments.mean, base=objective.base)
            errors = {
                "none": objective.value_at_zero,
                "uncalibrated": uncalibrated,
                "error": fit.error,
                "other none": other.value_at_zero,
                "other error": sized.family.error(other, fit.correction),
            }
            rows[layer_name] = {what: float(f"{error:.5e}") for what, error in errors.items()}
        result = {
            "title": sized.title,
            "numbers": sum(sized.family.count(layer.shape, sized.rank) for layer in layers.values()),
            "seconds": round(time.perf_counter() - begun, 1),
            "layers": rows,
        }
        with FileLock(f"{asked.out}.lock"):
            asked.out.write_text(json.dumps(read(asked.out) | {name: result}) + "\n", encoding="utf-8")


def table(results: dict[str, dict[str, object]]) -> str:
    """Return what each family closes, the mean over layers, as Markdown."""
    rows = []
    for name, result in results.items():
        layers = list(result["layers"].values())
        closed = [fmean(1 - row[part] / row["none"] for row in layers) for part in ("uncalibrated", "error")]
        other = [1 - row["other error"] / row["other none"] for row in layers]
        worse = sum(row["error"] > row["uncalibrated"] * (1 + 1e-6) or row["error"] > row["none"] for row in layers)
        rows.append([
            result["title"] if name in FAMILIES else f"{result['title']}, {name.partition('-')[2]}",
            f"{result['numbers']:,}",
            *(f"{share:.1%}" for share in closed),
            f"{fmean(other):.1%}",
            str(worse),
            str(sum(share < 0 for share in other)),
            f"{result['seconds']:.0f}",
        ])
    head = (
        "family",
        "numbers",
        "without inputs",
        "calibrated",
        "on other text",
        "worse",
        "worse on other text",
        "seconds",
    )
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
