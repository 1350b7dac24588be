"""Several processes under torchrun give what one gives, and go on after one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import init
from safetensors.torch import load_file

from quailora.support.distributed import packed

# In float32: batches of other sizes round to other bfloat16 numbers.
SETTINGS = {"rank": 4, "samples": 8, "sequence_length": 32, "calibration_dtype": "model"}


def launch(model, out, inputs, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "quailora", "init", str(model), "--out", str(out), "--inputs", inputs, "--offload", "always"]
    command += [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "", **more}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def assert_same_corrections(found, expected):
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert found.keys() == expected.keys()
    names = [name for name in found if "lora_A" in name]
    assert len(names) == 14
    for name in names:
        other = name.replace("lora_A", "lora_B")
        correction = expected[other] @ expected[name]
        left = found[other] @ found[name] - correction
        assert left.norm() < 1e-3 * correction.norm(), name


@pytest.mark.parametrize("inputs", ["full", pytest.param("asymmetric", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tiny_llama, tmp_path, inputs):
    process = launch(tiny_llama, tmp_path / "two", inputs)
    _, told = process.communicate()
    assert process.returncode == 0, told.decode()
    init(str(tiny_llama), out=str(tmp_path / "one"), inputs=inputs, **SETTINGS)
    assert_same_corrections(tmp_path / "two", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_the_next_one_goes_on(tiny_llama, tmp_path):
    out, state = tmp_path / "two", tmp_path / "two.partial"
    process = launch(tiny_llama, out, "quantized")
    while process.poll() is None and not any(state.rglob("layers/*.safetensors")):
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    victim = next(child for child in reversed(children) if b"quailora" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode != 0
    assert not out.exists()
    assert any(state.rglob("layers/*.safetensors"))

    process = launch(tiny_llama, out, "quantized")
    _, told = process.communicate()
    assert process.returncode == 0, told.decode()
    init(str(tiny_llama), out=str(tmp_path / "one"), inputs="quantized", **SETTINGS)
    assert_same_corrections(out, tmp_path / "one")


def test_work_is_packed_by_cost(monkeypatch):
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 1.0}
    shares = []
    monkeypatch.setattr("quailora.support.distributed.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("quailora.support.distributed.rank", lambda rank=rank: rank)
        shares.append(packed(costs))
    assert sorted(shares[0] + shares[1]) == sorted(costs)
    assert [sum(costs[name] for name in share) for share in shares] == [8.0, 8.0]
    assert torch.distributed.is_available()
