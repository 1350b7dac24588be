"""Models and bases by their names on the hub."""

from __future__ import annotations

import json
import shutil

import torch
from helpers import init
from hub import Hub, serving
from safetensors.torch import load_file, save_file
from test_hub import SMALL, run_commands

from quailora import NF4


def split(folder):
    """Put the weights of a folder into two shards, and what an older upload left beside them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    save_file({names[0]: torch.zeros(1)}, folder / "part-2.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_models_and_bases_are_fetched_by_name(tiny_llama, tmp_path):
    """In shards, and only what is needed: the adapter is that of the folders."""
    options = {"rank": 4, "samples": 2, "sequence_length": 32}
    init(str(tiny_llama), out=str(tmp_path / "a"), quantizer=NF4(), save_base=True, **options)
    base = shutil.copytree(tmp_path / "a" / "base", tmp_path / "base")
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    pickled = shutil.copytree(tiny_llama, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_llama / "model.safetensors"), pickled / "pytorch_model.bin")
    split(base)
    split(model)
    repositories = {"org/model": model, "org/base": base, "org/pickled": pickled, "org/adapter": tmp_path / "a"}
    with serving(Hub(repositories, gated=("org/secret",))) as hub:
        made, checked, *refused = run_commands(
            hub,
            tmp_path / "cache",
            ["init", "org/model", "--base", "org/base", "--out", tmp_path / "b", *SMALL],
            ["check", tmp_path / "a", "--base", "org/base"],
            ["init", "org/pickled", "--out", tmp_path / "c", *SMALL],
            ["init", "org/adapter", "--out", tmp_path / "c", *SMALL],
            ["init", "org/nothing", "--out", tmp_path / "c", *SMALL],
            ["init", "org/secret", "--out", tmp_path / "c", *SMALL],
            ["init", tiny_llama, "--base", "org/nothing", "--out", tmp_path / "c", *SMALL],
            ["init", "org/base", "--out", tmp_path / "c", *SMALL],
        )
        asked = " ".join(hub.asked)
    assert made[0] == 0, made[1]
    assert checked[0] == 0, checked[1]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-5)
    assert "part-1.safetensors" in asked
    assert "part-2.safetensors" not in asked
    assert "pytorch_model.bin" not in "".join(line for line in hub.asked if line.startswith("GET org/adapter"))
    expected = [
        "(pytorch_model.bin) are in PyTorch's pickle format",
        "it holds an adapter alone",
        "there is no such folder, and the hub has no model of this name",
        "The hub restricts access to 'org/secret'. Ask for access on the model's page, then log in",
        "there is no such folder, and the hub has no model of this name",
        "is quantized already (by bitsandbytes)",
    ]
    for match, (status, said) in zip(expected, refused, strict=True):
        assert status == 1
        assert "Traceback" not in said
        assert match in " ".join(said.split())
