"""The files in `examples/` are run as they stand, with a smaller model and less text."""

from __future__ import annotations

import json

import pytest
import yaml

from examples import ROOT

FILES = sorted((ROOT / "examples").glob("*.yaml"))
SMALL = {
    "init": ["--samples", "4", "--sequence-length", "64"],
    "compare": ["--samples", "4", "--sequence-length", "64", "--windows", "1", "--window-length", "64", "--ranks", "2"],
}


def test_each_command_with_many_options_has_an_example():
    assert [file.stem for file in FILES] == ["compare", "init"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_runs_by_the_command_that_it_names(run, tiny_llama, tmp_path, file):
    command = file.stem
    assert f"quailora {command} MODEL --config examples/{file.name}" in file.read_text(encoding="utf-8")
    status, _, error = run(command, tiny_llama, "--config", file, *SMALL[command], "--out", tmp_path / "out")
    assert status == 0, error


def test_what_the_example_of_init_says_is_done(run, tiny_llama, tmp_path):
    file = ROOT / "examples" / "init.yaml"
    status, _, error = run(
        "init", tiny_llama, "--config", file, *SMALL["init"], "--rank", "3", "--out", tmp_path / "out"
    )
    assert status == 0, error
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (3, 32)
    assert set(config["rank_pattern"].values()) == {32}
    sidecar = json.loads((tmp_path / "out" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["quantizer"] == yaml.safe_load(file.read_text(encoding="utf-8"))["quantizer"]
