"""A run can end at any moment, and the next one goes on from there."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import init
from runs import SMALL, content, killed_after, small_run, stopped_after_a_block
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quailora import GPTQ, NF4, AlternatingLeastSquares
from quailora.calibration.text import shipped_text
from quailora.calibration.tokens import CalibrationTokens
from quailora.errors import NumericalError, OutputExistsError, ResumeError, StorageError
from quailora.pipeline.checkpoint import Checkpoint, digest_of_json


def state(out):
    return out.with_name(f"{out.name}.partial")


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory):
    """What runs that nothing has ended write, by their inputs."""

    @cache
    def run(inputs):
        out = tmp_path_factory.mktemp("uninterrupted") / inputs
        small_run(tiny_llama, out, inputs=inputs)
        return content(out)

    return run


@pytest.mark.parametrize(
    ("inputs", "writes"),
    [("full", 1), ("full", 6), ("full", 9), ("full", 17), ("quantized", 4), ("quantized", 9), ("quantized", 16)]
    + [("asymmetric", writes) for writes in (1, 8, 14, 20, 26)],
)
def test_a_run_goes_on_where_it_ended(tiny_llama, uninterrupted, tmp_path, monkeypatch, inputs, writes):
    """Between boundaries, inside a block, in its second pass: bit by bit the same adapter."""
    expected = uninterrupted(inputs)
    with killed_after(writes, monkeypatch):
        small_run(tiny_llama, tmp_path / "killed", inputs=inputs)
    assert not (tmp_path / "killed").exists()
    before = {path.name: path.stat().st_mtime_ns for path in state(tmp_path / "killed").rglob("layers/*")}
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda *arguments, save=Checkpoint.save: saved.append(save(*arguments)))
    small_run(tiny_llama, tmp_path / "killed", inputs=inputs)
    assert content(tmp_path / "killed") == expected
    assert len(saved) == 14 - len(before)
    assert not state(tmp_path / "killed").exists()


def test_a_saved_base_survives_too(tiny_llama, tmp_path, monkeypatch):
    small_run(tiny_llama, tmp_path / "alone", quantizer=GPTQ(), save_base=True)
    with killed_after(12, monkeypatch):
        small_run(tiny_llama, tmp_path / "killed", quantizer=GPTQ(), save_base=True)
    small_run(tiny_llama, tmp_path / "killed", quantizer=GPTQ(), save_base=True)
    for name in ("adapter_model.safetensors", "base/model.safetensors"):
        first, second = (load_file(tmp_path / folder / name) for folder in ("alone", "killed"))
        assert first.keys() == second.keys()
        assert all((first[key] == second[key]).all() for key in first)


def test_other_settings_are_refused_with_what_differs(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with killed_after(12, monkeypatch):
        small_run(tiny_llama, out)
    with pytest.raises(ResumeError, match=r"\(rank: 4 then, 2 now\).*`fresh=True`"):
        small_run(tiny_llama, out, rank=2)
    with pytest.raises(ResumeError, match=r"samples: 8 then, 6 now; calibration tokens"):
        small_run(tiny_llama, out, samples=6)
    small_run(tiny_llama, out, rank=2, fresh=True)
    small_run(tiny_llama, tmp_path / "alone", rank=2)
    assert content(out) == content(tmp_path / "alone")


def test_other_weights_are_refused(tiny_llama, tmp_path, monkeypatch, tokenizer):
    tensors = load_file(tiny_llama / "model.safetensors")
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    with killed_after(12, monkeypatch):
        small_run(model, tmp_path / "out")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResumeError, match=r"weights: [0-9a-f]* then, [0-9a-f]* now"):
        small_run(model, tmp_path / "out")


def test_a_finished_result_is_kept_and_an_unfinished_one_is_no_result(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_run(tiny_llama, out)
    before = content(out)
    with pytest.raises(OutputExistsError, match=r"out.* already"):
        small_run(tiny_llama, out)
    with killed_after(12, monkeypatch):
        small_run(tiny_llama, out, rank=2, overwrite=True)
    assert content(out) == before


def test_damaged_state_is_made_again(tiny_llama, tmp_path, monkeypatch):
    """A flipped bit anywhere costs the file that it is in, and no more."""
    inputs, writes = "asymmetric", 24
    small_run(tiny_llama, tmp_path / "alone", inputs=inputs)
    with killed_after(writes, monkeypatch):
        small_run(tiny_llama, tmp_path / "killed", inputs=inputs)
    kept = shutil.copytree(state(tmp_path / "killed"), tmp_path / "kept")
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.suffix in {".json", ".safetensors"})
    draw = random.Random(0)
    for index, file in enumerate(draw.sample(files, 3) + [file for file in files if file.suffix == ".json"]):
        out = tmp_path / f"damaged-{index}"
        shutil.copytree(kept, state(out))
        flip(state(out) / file, draw)
        small_run(tiny_llama, out, inputs=inputs)
        assert content(out) == content(tmp_path / "alone"), file


def flip(file, draw):
    """Flip a bit of the content; the first eight bytes of a file of tensors are the length of its header."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(8, len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def test_only_the_damaged_layer_is_made_again(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_run(tiny_llama, tmp_path / "alone")
    with killed_after(14, monkeypatch):
        small_run(tiny_llama, out)
    damaged, shortened, *others = sorted(state(out).rglob("layers/*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in others}
    tensors = load_file(damaged)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, damaged, metadata_of(damaged))
    shortened.write_bytes(shortened.read_bytes()[:40])
    saved = []

    def noted(checkpoint, layer, outcome, save=Checkpoint.save):
        saved.append(layer)
        save(checkpoint, layer, outcome)
        assert {path: path.stat().st_mtime_ns for path in others} == before

    monkeypatch.setattr(Checkpoint, "save", noted)
    small_run(tiny_llama, out)
    assert {damaged.stem, shortened.stem} <= set(saved)
    assert not {path.stem for path in others} & set(saved)
    assert content(out) == content(tmp_path / "alone")


def test_another_number_of_processes_runs_the_model_again(tiny_llama, tmp_path, monkeypatch):
    """Batches are other ones then, and hidden states are kept by the number of a batch; layers stay."""
    options = {"inputs": "asymmetric", "calibration_dtype": "model"}
    small_run(tiny_llama, tmp_path / "alone", **options)
    batches = CalibrationTokens.batches
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationTokens, "batches", lambda self, shares, **more: batches(self, 2, **more))
        with stopped_after_a_block(patch):
            small_run(tiny_llama, tmp_path / "out", **options)
    file = state(tmp_path / "out") / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    assert (manifest["blocks_done"], manifest["processes"]) == (1, 1)
    manifest = {name: manifest[name] for name in manifest if name != "digest"} | {"processes": 2}
    file.write_text(json.dumps(manifest | {"digest": digest_of_json(manifest)}), encoding="utf-8")
    kept = {path: path.stat().st_mtime_ns for path in state(tmp_path / "out").rglob("layers/*.safetensors")}
    saved = []
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, name, layer: saved.append(name) or save(self, name, layer))
    small_run(tiny_llama, tmp_path / "out", **options)
    assert len(kept) == 7
    assert not {path.stem for path in kept} & set(saved)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "out"))
    for name in (name for name in first if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(second[other] @ second[name], first[other] @ first[name], rtol=1e-2, atol=1e-4)


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_damaged_manifest_of_another_run_is_left_alone(tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with killed_after(12, monkeypatch):
        small_run(tiny_llama, out)
    (state(out) / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(
        ResumeError, match=r"manifest .* is damaged, and .* holds the state of a run with other settings"
    ):
        small_run(tiny_llama, out, rank=2)
    assert len(list(state(out).rglob("layers/*.safetensors"))) > 0
    small_run(tiny_llama, out, rank=2, fresh=True)


def test_other_spellings_of_a_path_are_the_same_run(tiny_llama, tmp_path, monkeypatch):
    """Of the model, of the text, and of the output folder."""
    text = tmp_path / "text.txt"
    text.write_text(shipped_text("calibrate"), encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    shutil.copytree(tiny_llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with killed_after(12, monkeypatch):
        small_run("model", Path("out"), calibration="text.txt")
    done = list(state(tmp_path / "out").rglob("layers/*.safetensors"))
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda *arguments, save=Checkpoint.save: saved.append(save(*arguments)))
    monkeypatch.setenv("HOME", str(tmp_path))
    init(tmp_path / "link", out="~/model/../out/", calibration=text, **SMALL)
    assert len(saved) == 14 - len(done) < 14


def test_two_runs_into_one_folder(tiny_llama, tmp_path):
    state(tmp_path / "out").mkdir()
    with FileLock(state(tmp_path / "out") / "lock"), pytest.raises(ResumeError, match="Another run is at work in"):
        small_run(tiny_llama, tmp_path / "out")
    small_run(tiny_llama, tmp_path / "out")


def test_a_full_disk_loses_nothing(tiny_llama, tmp_path):
    """Simulated by a limit on the size of files, which fails in the same calls."""
    out = tmp_path / "out"
    small_run(tiny_llama, tmp_path / "alone", quantizer=NF4(), save_base=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(StorageError, match=r"Cannot write .*safetensors.*run the same command again"):
            small_run(tiny_llama, out, quantizer=NF4(), save_base=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert list(state(out).rglob(".*.partial")) == []
    small_run(tiny_llama, out, quantizer=NF4(), save_base=True)
    assert content(out) == content(tmp_path / "alone")


@pytest.mark.parametrize("offload", ["always", "never"])
def test_the_damaged_weight_is_named_and_earlier_layers_are_kept(tiny_llama, tmp_path, offload):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    healthy = tensors["model.layers.1.self_attn.v_proj.weight"].clone()
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"entries in model\.layers\.1\.self_attn\.v_proj\.weight\. The"):
        small_run(model, tmp_path / "out", offload=offload)
    assert len(list(state(tmp_path / "out").rglob("layers/*.safetensors"))) == 7
    assert healthy.isfinite().all()


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], pytest.param([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], marks=pytest.mark.slow)],
    ids=len,
)
def test_signals(tiny_llama, tmp_path, signals):
    """SIGINT and SIGTERM say how to go on; after them and SIGKILL the next run does, to the same result."""
    command = [sys.executable, "-m", "quailora", "init", str(tiny_llama), "--out", str(tmp_path / "killed")]
    command += [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command += ["--solver", "quailora", "--solver.iterations", "400"]  # long enough to be met at work
    slow = AlternatingLeastSquares(iterations=400)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sent in signals:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignore"
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        signal.signal(signal.SIGINT, before)
        there = set(state(tmp_path / "killed").rglob("layers/*.safetensors"))
        while process.poll() is None and set(state(tmp_path / "killed").rglob("layers/*.safetensors")) == there:
            time.sleep(0.01)
        process.send_signal(sent)
        _, told = process.communicate()
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sent]
        if sent != signal.SIGKILL:
            assert "goes on when the same command is run again" in " ".join(told.decode().split())
    small_run(tiny_llama, tmp_path / "killed", solver=slow)
    small_run(tiny_llama, tmp_path / "alone", solver=slow)
    assert content(tmp_path / "killed") == content(tmp_path / "alone")
