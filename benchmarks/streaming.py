"""Peak memory of a model that is streamed from disk, against loading it whole, and the time of each block.

    python benchmarks/streaming.py --model big/ --calibration wikitext2_valid.txt

Memory is resident and anonymous (`RssAnon` of Linux): file pages, which the system may drop at any time, do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

_LOAD = "from quailora.models.load import load_model; model = load_model({model!r}).model"
_OWN = _LOAD + "\nfor parameter in model.parameters(): parameter.data = parameter.data.clone()"


def peak_anonymous(command: list[str]) -> tuple[float, float]:
    """Run a command; return its peak of resident anonymous memory in GiB, sampled every 10 ms, and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        lines = status.read_text(encoding="ascii").splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak / 2**20, time.perf_counter() - start


def main(
    model: str, calibration: str | None = None, rank: int = 16, samples: int = 4, sequence_length: int = 512
) -> None:
    """Print the figures.

    Args:
        model: folder of the model.
        calibration: text to calibrate on; the shipped text by default.
        rank: rank of the adapter.
        samples: calibration windows.
        sequence_length: tokens in each.
    """
    mapped, seconds = peak_anonymous([sys.executable, "-c", _LOAD.format(model=model)])
    print(f"loading the model, memory-mapped and untouched: {mapped:.2f} GiB, {seconds:.0f} s")
    whole, seconds = peak_anonymous([sys.executable, "-c", _OWN.format(model=model)])
    print(f"loading the model whole, its weights in memory: {whole:.2f} GiB, {seconds:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        command = [sys.executable, "-m", "quailora", "init", model, "--out", str(out), "--offload", "always"]
        command += ["--solver", "optimal", "--rank", str(rank), "--samples", str(samples)]
        command += ["--sequence-length", str(sequence_length)]
        command += ["--calibration", calibration] if calibration else []
        streamed, seconds = peak_anonymous(command)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    print(f"initializing it from disk: {streamed:.2f} GiB, {seconds:.0f} s")
    print(f"share: {streamed / whole:.1%}")
    blocks = list(report["block_seconds"].values())
    third = max(1, len(blocks) // 3)
    first, last = (sum(part) / len(part) for part in (blocks[1 : third + 1], blocks[-third:]))
    print(f"seconds a block: {first:.2f} in the first third, {last:.2f} in the last ({last / first:.2f} times)")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
