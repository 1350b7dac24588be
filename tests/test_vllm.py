"""Bases, adapters and merged models under vLLM, where quailora is not installed: `make vllm`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import evaluate, init
from trainings import train

from quailora import GPTQ, Calibration, Optimal, Output, TextSource, Uniform, merge
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.scales import ScaleTraining
from quailora.merging.training import MergeTraining
from quailora.methods.block_training import BlockTraining

PYTHON = os.environ.get("QUAILORA_VLLM")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "vllm_perplexity.py"
SIZE = {"windows": 4, "sequence_length": 128}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="`make vllm` sets up the other environment"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("all_threads"),
]


def run(base, *adapters, text):
    """Run a base and adapters on it in vLLM."""
    # On a CPU, vLLM rounds the inputs of layers of 4 bits to 8 bits unless it is told not to.
    environment = {**os.environ, "VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [PYTHON, SCRIPT, base, *adapters, "--text", text, "--windows", SIZE["windows"]]
    command += ["--length", SIZE["sequence_length"]]
    return subprocess.run(
        list(map(str, command)), cwd="/", env=environment, capture_output=True, text=True, check=False
    )


def served(base, *adapters, text):
    """Return the perplexities that vLLM finds for a base and for adapters on it."""
    done = run(base, *adapters, text=text)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names = ("base: ", *(f"{adapter}: " for adapter in adapters))
    return [float(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if line.startswith(names)]


def test_a_base_with_its_adapter(shared_data, tmp_path):
    """Any zero points in AutoAWQ's format, and the adapter beside it."""
    text, seen = (str(shared_data / f"wikitext2_{name}.txt") for name in ("raw_test", "valid"))
    options = {"solver": Optimal(), "rank": 8, "samples": 8, "calibration": seen, "save_base": True}
    init("demo", out=str(tmp_path / "a"), quantizer=Uniform(), base_format="awq", **options)
    results = evaluate("demo", adapter=str(tmp_path / "a"), text=text, **SIZE).results
    ours = [results[name].perplexity for name in ("quantized", "quantized + adapter")]
    theirs = served(tmp_path / "a" / "base", tmp_path / "a", text=text)
    print(f"base and adapter {ours} here, {theirs} by vLLM")
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_autogptq_format(symmetric, shared_data, tmp_path):
    """Read where levels are symmetric; the documents say that vLLM refuses others."""
    text = str(shared_data / "wikitext2_raw_test.txt")
    options = {"solver": Optimal(), "rank": 1, "samples": 2, "save_base": True}
    init("demo", out=str(tmp_path / "a"), quantizer=Uniform(symmetric=symmetric), **options)
    if symmetric:
        theirs = served(tmp_path / "a" / "base", text=text)
        found = evaluate("demo", adapter=str(tmp_path / "a"), text=text, **SIZE).results["quantized"].perplexity
        print(f"symmetric base {found} here, {theirs} by vLLM")
        assert theirs == pytest.approx([found], rel=0.01)
    else:
        done = run(tmp_path / "a" / "base", text=text)
        assert done.returncode != 0
        assert "Unsupported quantization config: bits=4, sym=False" in done.stdout + done.stderr


def test_a_merged_model(shared_data, tmp_path):
    """Codes and scales from both trainings."""
    text, seen = (str(shared_data / f"wikitext2_{name}.txt") for name in ("raw_test", "valid"))
    init("demo", out=str(tmp_path / "start"), rank=8, calibration=seen, samples=8, solver=Optimal())
    train(tmp_path / "start", tmp_path / "trained", by=0.2)
    merge(
        tmp_path / "trained",
        GPTQ(),
        out=Output(tmp_path / "merged", base_format="awq"),
        calibration=Calibration(TextSource(seen), samples=8),
        texts=EvaluationTexts(windows=0),
        training=MergeTraining(BlockTraining(2, windows=8), ScaleTraining(2)),
    )
    found = evaluate("demo", base=str(tmp_path / "merged"), text=text, **SIZE).results["quantized"].perplexity
    theirs = served(tmp_path / "merged", text=text)
    print(f"merged {found} here, {theirs} by vLLM")
    assert theirs == pytest.approx([found], rel=0.01)
