"""Checkpoints that are damaged, incomplete or of a kind that is not trusted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import evaluate, init
from runs import small_run
from safetensors.torch import load_file, save_file

from quailora.errors import ModelError, NumericalError
from quailora.models.load import load_model

each_offload = pytest.mark.parametrize("offload", ["always", "never"])


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    """The model in two files."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(tiny_llama / "model.safetensors")
    places = {name: f"part-{'.layers.1.' in name:d}.safetensors" for name in tensors}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def assert_refused(model, tmp_path, offload, told):
    with pytest.raises(ModelError, match=told):
        small_run(model, tmp_path / "out", offload=offload)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@each_offload
def test_shards_are_one_model(sharded, tiny_llama, tmp_path, offload):
    small_run(sharded, tmp_path / "out", offload=offload)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out")
    small_run(tiny_llama, tmp_path / "out", offload=offload)
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(expected) == 28
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_offload
@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_a_truncated_shard_is_named(sharded, tmp_path, offload, keep):
    shard = sharded / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert_refused(sharded, tmp_path, offload, r"part-1\.safetensors")


@each_offload
def test_a_missing_shard_is_named(sharded, tmp_path, offload):
    (sharded / "part-1.safetensors").unlink()
    assert_refused(sharded, tmp_path, offload, r"part-1\.safetensors")


@each_offload
def test_a_missing_weight_is_named(sharded, tmp_path, offload):
    shard = sharded / "part-1.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard, {"format": "pt"})
    assert_refused(sharded, tmp_path, offload, r"model\.layers\.1\.mlp\.up_proj\.weight")


@each_offload
def test_pickles_are_refused_unless_allowed(tiny_llama, tmp_path, offload):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_llama / "model.safetensors"), folder / "pytorch_model.bin")
    assert_refused(folder, tmp_path, offload, r"pickle format, which can run any code.*allow_pickle=True")
    small_run(folder, tmp_path / "out", offload=offload, allow_pickle=True)
    loaded, expected = load_model(str(folder), allow_pickle=True).model, load_model(str(tiny_llama)).model
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict())


def enlarged(tiny_llama, tmp_path, factor, *names):
    """A copy of the model, some of whose layers are multiplied."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    larger = {key: factor * tensor if key.endswith(names) else tensor for key, tensor in tensors.items()}
    save_file(larger, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("inputs", ["full", "asymmetric"])
def test_weights_that_are_too_large_are_refused_by_layer(tiny_llama, tmp_path, inputs):
    model = enlarged(tiny_llama, tmp_path, 1e38, "layers.1.mlp.up_proj.weight")
    options = {"rank": 4, "samples": 4, "sequence_length": 32, "inputs": inputs}
    with pytest.raises(NumericalError, match=r"Layer model.layers.1.mlp.(up|down)_proj: "):
        init(str(model), out=str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    ("factor", "names", "told"),
    [
        (1e38, ("layers.1.mlp.up_proj.weight",), "Layer model.layers.1.mlp.up_proj: Expected finite weights"),
        (1e38, ("proj.weight",), "Full precision: expected a loss on every window, got NaN"),
        (float("nan"), ("layers.0.mlp.up_proj.weight",), "NaN"),
    ],
)
def test_perplexities_that_are_no_numbers_are_refused(tiny_llama, tmp_path, factor, names, told):
    model = enlarged(tiny_llama, tmp_path, factor, *names)
    with pytest.raises(NumericalError, match=told):
        evaluate(str(model), windows=1, sequence_length=32)
