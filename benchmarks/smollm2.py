"""The perplexity table of README.md: SmolLM2-135M under NF4, by method and rank.

    python benchmarks/smollm2.py --calibration wikitext2_valid.txt --text wikitext2_raw_test.txt --out results/

Writes one adapter a row and `results.json` to the output folder, and prints the table in Markdown.
"""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse import auto_cli

from quailora.calibration import Calibration, CalibrationDtype, TextSource, evaluation_windows
from quailora.demo import compare
from quailora.models.load import load_model
from quailora.report.tables import markdown_table


def main(
    calibration: str,
    text: str,
    out: str,
    fields: tuple[str, ...] = ("text",),
    samples: int = 16,
    sequence_length: int = 1024,
    windows: int = 10,
    ranks: tuple[int, ...] = (16, 64),
    model: str = "demo",
    calibration_dtype: CalibrationDtype = "auto",
) -> None:
    """Print the table.

    Args:
        calibration: text or .jsonl file to calibrate on.
        text: text or .jsonl file to evaluate on.
        out: output folder.
        fields: text fields of calibration records.
        samples: calibration windows.
        sequence_length: tokens in a calibration window.
        windows: evaluation windows of 2048 tokens.
        ranks: ranks of the adapters.
        model: the model.
        calibration_dtype: arithmetic of the calibration pass, as in `quailora init`.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    loaded = load_model(model)
    texts = list(TextSource(text).documents())
    source = Calibration(TextSource(calibration, fields), samples, sequence_length, dtype=calibration_dtype)
    title = f"{samples} x {sequence_length} tokens of {Path(calibration).name}, {windows} x 2048 of {Path(text).name}"
    ids = evaluation_windows(loaded.tokenizer, texts, windows, 2048)
    comparison = compare(loaded, source, ids, Path(out), title=title, ranks=ranks)
    print(f"\n{title}\n\n{markdown_table(('weights', 'perplexity', 'gap closed'), comparison.rows())}")
    for name, layers in comparison.layers.items():
        slack = max(layer.error / layer.error_optimal - 1 for layer in layers if layer.error_optimal)
        ordered = all(
            layer.error_optimal <= layer.error * (1 + 1e-6)
            and layer.error <= layer.error_uncalibrated * (1 + 1e-6)
            and layer.error_uncalibrated <= layer.error_none * (1 + 1e-6)
            for layer in layers
        )
        print(f"{name}: {len(layers)} layers, errors in order: {ordered}, worst layer {slack:.4%} above the optimum")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
