"""Every quantizer at 2, 3, 4 and 8 bits: the base alone, with an SVD of its error, with the optimum for its outputs.

    python benchmarks/quantizer_table.py --calibration wikitext2_valid.txt --text wikitext2_raw_test.txt --out table

One walk through the model serves all rows of as many bits, and what is finished is kept in the folder. The rows
`auto_gptq` are by the class of auto-gptq itself, read from its wheel as the tests read it; without the wheel they are
left out.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli

from quailora import FP4, GPTQ, HQQ, NF4, NF4GPTQ, AutoGPTQ, Int8, Quantizer, TorchaoInt8, Uniform
from quailora.adapters.lora import LoraScaling
from quailora.calibration.sources import TextCalibration
from quailora.calibration.text import TextSource
from quailora.calibration.windows import Calibration
from quailora.comparison.runner import FULL_PRECISION, ComparisonRunner
from quailora.comparison.store import RowStore
from quailora.comparison.variants import Variant
from quailora.evaluation.tasks import Tasks
from quailora.evaluation.texts import EvaluationTexts
from quailora.methods.recipes import RECIPES
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.pipeline.fingerprint import fingerprint
from quailora.quantizers import auto_gptq
from quailora.support.tables import markdown_table

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from oracles import load_auto_gptq

GROUP = 64
BITS = (2, 3, 4, 8)
COLUMNS = {"none": None, "SVD": "lorc", "Optimal": "qera-exact"}
"""The recipe of each column."""

OTHERS: dict[int, dict[str, Quantizer]] = {
    4: {"fp4": FP4(), "nf4": NF4(), "nf4_gptq": NF4GPTQ()},
    8: {"int8": Int8(), "torchao_int8": TorchaoInt8()},
}
"""Quantizers of one number of bits."""


def quantizers(bits: int) -> dict[str, Quantizer]:
    """Return the quantizers of so many bits, by name."""
    found: dict[str, Quantizer] = {"uniform": Uniform(bits, GROUP), "hqq": HQQ(bits, GROUP)}
    backend = load_auto_gptq()
    if backend is not None:
        auto_gptq.backend = lambda: backend
        torch.cuda.synchronize = lambda *_: None  # which that class calls, on any device
        found["auto_gptq"] = AutoGPTQ(bits, GROUP, symmetric=False)
    found["gptq"] = GPTQ(bits, GROUP)
    return found | OTHERS.get(bits, {})


def main(
    calibration: str,
    text: str,
    out: str,
    model: str = "demo",
    rank: int = 16,
    samples: int = 16,
    windows: int = 4,
) -> None:
    """Measure all rows and print the table.

    Args:
        calibration: calibration text.
        text: text to evaluate on.
        out: folder for finished rows.
        model: hub name or folder.
        rank: of the adapters.
        samples: windows of 1024 tokens to calibrate on.
        windows: windows of 2048 tokens to evaluate on.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("quailora").setLevel(logging.INFO)
    loaded = load_model(model)
    layers = linear_layers(loaded.model)
    source = TextCalibration(Calibration(TextSource(calibration), samples, 1024))
    seen = source.tokens(loaded.tokenizer)
    texts = dict(EvaluationTexts((text,), windows=windows, window_length=2048).cut(loaded))
    work = Path(out) / "work"
    work.mkdir(parents=True, exist_ok=True)
    store = RowStore(Path(out) / "rows", fingerprint({"windows": windows}, loaded, seen), fresh=False)
    store.open()
    runner = ComparisonRunner(loaded, layers, layers, source, seen, texts, Tasks(), work, store, seed=0)
    table = []
    for bits in BITS:
        found = quantizers(bits)
        runner.measure([
            variant(f"{name} {bits} {column}", found[name], column, rank) for name in found for column in COLUMNS
        ])
        rows = store.rows()
        for name in found:
            cells = [rows[f"{name} {bits} {column}"] for column in COLUMNS]
            perplexities = [f"{row.scores[Path(text).stem].perplexity:.2f}" for row in cells]
            table.append([f"`{name}`", str(bits), f"{cells[0].bits_per_weight:.2f}", *perplexities])
    full = store.rows()[FULL_PRECISION].scores[Path(text).stem].perplexity
    adapter = 16 * rank * sum(sum(layer.shape) for layer in layers.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    print(f"Full precision {full:.2f}; adapters take {adapter / weights:.2f} bits for each weight of the base.\n")
    print(markdown_table(["quantizer", "bits", "bits a weight", *COLUMNS], table))


def variant(name: str, quantizer: Quantizer, column: str, rank: int) -> Variant:
    """Return a row: a base alone or with an adapter."""
    recipe = COLUMNS[column]
    if recipe is None:
        return Variant.alone(name, quantizer)
    return Variant(name, RECIPES[recipe].method(quantizer, LoraScaling(rank)), recipe)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
