"""Kill runs at random moments, go on until they are complete, and compare the adapters with that of a run left alone.

    python benchmarks/kill_and_resume.py --runs 20
    python benchmarks/kill_and_resume.py --runs 3 --processes 2

Prints how many adapters are identical bit by bit, and how often runs were killed. The model is SmolLM2 cut to its
first blocks, so that a run takes some seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli


def small_model(folder: Path, blocks: int) -> None:
    """Save the first blocks of SmolLM2 as a model."""
    from quailora.models.load import load_model

    loaded = load_model("demo")
    loaded.model.model.layers = loaded.model.model.layers[:blocks]
    loaded.model.config.num_hidden_layers = blocks
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def content(adapter: Path) -> bytes:
    """Return what PEFT reads of an adapter."""
    return b"".join((adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


def main(
    runs: int = 20, processes: int = 1, kills: int = 3, blocks: int = 6, inputs: str = "full", seed: int = 0
) -> None:
    """Print the counts.

    Args:
        runs: runs to kill.
        processes: processes of each run; of several, a random one is killed.
        kills: how often each run is killed before it is left alone.
        blocks: blocks of the model.
        inputs: as in `quailora init`.
        seed: seed of the moments.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model(folder / "model", blocks)
        launcher = [sys.executable, "-m", "quailora"]
        if processes > 1:
            torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
            launcher = [sys.executable, "-m", *torchrun, "-m", "quailora"]
        options = ["--samples", "8", "--sequence-length", "256", "--rank", "8", "--inputs", inputs]

        def start(out: Path) -> subprocess.Popen[bytes]:
            command = [*launcher, "init", str(folder / "model"), "--out", str(out), *options, "--offload", "always"]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

        began = time.perf_counter()
        process = start(folder / "alone")
        if process.wait():
            raise SystemExit(process.stderr.read().decode())
        seconds = time.perf_counter() - began
        expected = content(folder / "alone")
        same = killed = resumed = 0
        for _ in range(runs):
            out = folder / "killed"
            for _ in range(kills):
                process = start(out)
                time.sleep(draw.uniform(0.3, 1.0) * seconds)
                if process.poll() is None:
                    os.kill(draw.choice(victims(process.pid)), signal.SIGKILL)
                    killed += 1
                process.wait()
                if (out / "adapter_model.safetensors").is_file():
                    break
                resumed += any(Path(f"{out}.partial").glob("run-*/layers/*.safetensors"))
            else:
                process = start(out)
                if process.wait():
                    raise SystemExit(process.stderr.read().decode())
            same += content(out) == expected
            shutil.rmtree(out)
            shutil.rmtree(f"{out}.partial", ignore_errors=True)
    print(f"{inputs} inputs, {processes} processes: {same} of {runs} adapters identical to the uninterrupted one")
    print(f"{killed} kills of runs of {seconds:.1f} s, {resumed} of which left finished layers to go on from")


def victims(pid: int) -> list[int]:
    """Return the processes that work: the children of a launcher, or the process itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    workers = [int(child) for child in children if b"quailora" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return workers or [pid]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
