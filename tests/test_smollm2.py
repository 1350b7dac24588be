"""The main job on the real model, on real text: minutes, so marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import evaluate, init

from quailora import AlternatingLeastSquares, Optimal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("all_threads"),
]

WINDOWS = 2


@pytest.mark.parametrize("solver", [AlternatingLeastSquares(), Optimal()], ids=repr)
def test_every_layer_and_the_model_are_better(solver, shared_data, tmp_path):
    """210 layers in the right order, QuAILoRA near the optimum, and most of the perplexity lost to NF4 recovered."""
    out = tmp_path / "adapter"
    result = init("demo", out=str(out), solver=solver, calibration=str(shared_data / "wikitext2_valid.txt"))
    assert len(result.report["layers"]) == 210
    for layer in result.report["layers"]:
        assert layer["error_optimal"] <= layer["error"] * (1 + 1e-6)
        assert layer["error"] <= 1.005 * layer["error_optimal"]
        assert layer["error"] <= layer["error_uncalibrated"] * (1 + 1e-6)
        assert layer["error_uncalibrated"] <= layer["error_none"] * (1 + 1e-6)
    text = str(shared_data / "wikitext2_raw_test.txt")
    results = evaluate("demo", adapter=str(out), text=text, windows=WINDOWS).results
    full, quantized, adapted = (result.perplexity for result in results.values())
    assert (quantized - adapted) / (quantized - full) > 0.6


@pytest.mark.parametrize("scaling", [{"alpha": 16.0}, {"alpha": 32.0}, {"alpha": 64.0}, {"rslora": True}], ids=str)
def test_stock_packages_give_the_same_perplexity(scaling, shared_data, tmp_path):
    """A script that imports no quailora, on the stock 4-bit base, for every scaling."""
    out, text = tmp_path / "adapter", str(shared_data / "wikitext2_raw_test.txt")
    init("demo", out=str(out), solver=Optimal(), samples=4, **scaling)
    ours = evaluate("demo", adapter=str(out), text=text, windows=WINDOWS).results["quantized + adapter"].perplexity
    base = json.loads((out / "quailora.json").read_text(encoding="utf-8"))["base_model"]
    script = Path(__file__).parents[1] / "benchmarks" / "stock_perplexity.py"
    command = [sys.executable, str(script), base, str(out), "--text", text, "--windows", str(WINDOWS)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(printed.split()[-1]) == pytest.approx(ours, rel=0.005)
