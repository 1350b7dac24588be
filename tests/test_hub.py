"""Adapters by their names on the hub, and uploads to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import init
from hub import Hub, serving
from safetensors.torch import load_file

from quailora.adapters.hub import adapter_folder
from quailora.errors import ModelError

SMALL = ["--rank", "4", "--samples", "2", "--sequence-length", "32"]

SEVERAL = """
import contextlib, io, json, sys
from quailora.cli.main import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        status = main(arguments)
    print(json.dumps([status, said.getvalue()]), flush=True)
"""


def run_commands(hub, cache, *commands):
    """Run commands in one process that knows only this hub; return the status and the words of each."""
    arguments = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, arguments],
        env=hub.environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_adapters_are_fetched_and_uploaded_by_name(tiny_llama, tmp_path):
    """In one process: starting it takes longer than all of these commands."""
    init(str(tiny_llama), out=str(tmp_path / "a"), rank=4, samples=2, sequence_length=32)
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"large")
    names = ("somebody/nothing", "somebody/secret")
    upload = ["init", tiny_llama, *SMALL, "--push-to-hub"]
    served = Hub({"somebody/adapter": tmp_path / "a"}, gated=("somebody/secret",), uploads=tmp_path / "uploads")
    with serving(served) as hub:
        checked, *refused, wrong, done = run_commands(
            hub,
            tmp_path / "cache",
            ["check", "somebody/adapter", "--base", tiny_llama],
            *(["evaluate", tiny_llama, "--adapter", name] for name in names),
            [*upload, "new", "--out", tmp_path / "x"],
            [*upload, "somebody/new", "--out", tmp_path / "b"],
        )
        assert not any("optimizer" in asked for asked in hub.asked if asked.startswith("GET somebody"))
    assert checked[0] == 0, checked[1]
    assert "somebody/adapter belongs on" in checked[1]
    for name, (status, said) in zip(names, refused, strict=True):
        assert status == 1
        assert f"got '{name}': there is no such folder, and the hub gives none" in said
    assert "Expected a hub name such as owner/adapter" in wrong[1]
    assert not (tmp_path / "x").exists()
    assert done[0] == 0, done[1]
    written = {file.name for file in (tmp_path / "b").iterdir()}
    assert {file.name for file in (tmp_path / "uploads").iterdir()} == written
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert load_file(tmp_path / "uploads" / "adapter_model.safetensors").keys() == tensors.keys()


def test_folders_come_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "adapter").mkdir(parents=True)
    assert adapter_folder("owner/adapter").is_dir()
    for name in ("nothing", "./owner/x", "/owner/x", "~/x", "a/b/c"):  # no names of the hub
        assert not adapter_folder(name).exists()
    with pytest.raises(ModelError, match="the hub gives none"):
        adapter_folder("owner/nothing")


@pytest.mark.slow
def test_a_refused_upload_leaves_the_adapter(tiny_llama, tmp_path):
    command = ["init", tiny_llama, *SMALL, "--push-to-hub", "somebody/new", "--out"]
    with serving(Hub({})) as hub:
        ((status, said),) = run_commands(hub, tmp_path / "cache", [*command, tmp_path / "b"])
    assert status == 1
    assert f"The adapter is complete in {tmp_path / 'b'}, but uploading it to 'somebody/new' failed" in said
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
