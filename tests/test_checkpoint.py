"""Which files of a folder count, against what transformers loads; folders whose files do not fit together."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quailora.errors import ModelError
from quailora.models.checkpoint import checkpoint_files, opened, stored_tensors
from quailora.models.load import load_model
from quailora.pipeline.fingerprint import weights_of

MARKED = "model.norm.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of the model without its weights."""
    return shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def tensors(tiny_llama):
    return load_file(tiny_llama / "model.safetensors")


def write(folder, files, tensors, value, index=None):
    """Write the tensors in these files, one of them filled with a value, and an index if it is asked for."""
    names, places = sorted(tensors), {}
    for number, file in enumerate(files):
        part = names[number :: len(files)]
        filled = {name: torch.full_like(tensors[name], value) if name == MARKED else tensors[name] for name in part}
        save_file(filled, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    if index:
        write_index(folder, places, index)


def write_index(folder, places, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def value_of(folder):
    """Return the value in the file that counts for us."""
    tensor = stored_tensors(str(folder))[MARKED]
    with opened(tensor.file) as content:
        return content.get_tensor(MARKED)[0].item()


INDEX = "model.safetensors.index.json"
NEW, OLD = (
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ["z-1.safetensors", "z-2.safetensors"],
)

FOLDERS = {
    "one file": [(["model.safetensors"], None)],
    "shards": [(NEW, INDEX)],
    "shards and what an older upload left": [(OLD, INDEX), (NEW, INDEX)],
    "one file and an index": [(NEW, INDEX), (["model.safetensors"], None)],
    "consolidated and adapter beside": [
        (["consolidated.safetensors"], None),
        (["adapter_model.safetensors"], None),
        (["model.fp16.safetensors"], None),
        (NEW, INDEX),
    ],
    "another index": [(OLD, "consolidated.safetensors.index.json"), (["model.safetensors"], None)],
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_that_count_are_those_that_transformers_loads(name, folder, tensors):
    for value, (files, index) in enumerate(FOLDERS[name], 1):
        write(folder, files, tensors, float(value), index)
    (folder / "original").mkdir()
    write(folder / "original", ["model.safetensors"], tensors, -1.0)
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight[0].item()
    assert value_of(folder) == theirs
    assert load_model(str(folder)).model.model.norm.weight[0].item() == theirs
    before = weights_of(str(folder))
    save_file({"other": torch.ones(1)}, folder / "more.safetensors")
    assert weights_of(str(folder)) == before


def test_a_file_that_the_configuration_names_counts(folder, tensors):
    write(folder, ["model.safetensors"], tensors, 1.0)
    write(folder, ["other.safetensors"], tensors, 2.0)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}), "utf-8")
    assert value_of(folder) == 2.0
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../x.safetensors"}), "utf-8")
    with pytest.raises(ModelError, match=r"config.json of .* names '../x.safetensors', which lies outside"):
        checkpoint_files(str(folder))


@pytest.mark.parametrize("place", ["../outside.safetensors", "{there}/outside.safetensors", "link.safetensors", 7])
def test_an_index_does_not_lead_outside_its_folder(place, folder, tensors, tmp_path):
    write(folder, NEW, tensors, 1.0)
    write(tmp_path, ["outside.safetensors"], tensors, 2.0)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    place = place.format(there=tmp_path) if isinstance(place, str) else place
    write_index(folder, dict.fromkeys(tensors, NEW[0]) | {MARKED: place})
    for read in (checkpoint_files, load_model):
        with pytest.raises(ModelError, match=r"index.json of .*, which lies outside the model's folder; it is not"):
            read(str(folder))


def test_links_of_the_hubs_cache_and_to_folders_are_followed(folder, tensors, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(folder, NEW, tensors, 3.0, INDEX)
    for file in folder.iterdir():
        shutil.copy(file, blobs)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    (tmp_path / "a link, öfter").symlink_to(folder)
    for each in (snapshot, tmp_path / "a link, öfter"):
        assert value_of(each) == load_model(str(each)).model.model.norm.weight[0].item() == 3.0


def add(folder):
    """Put all tensors of both files into the second one, too, which the index does not say."""
    save_file(load_file(folder / NEW[0]) | load_file(folder / NEW[1]), folder / NEW[1], {"format": "pt"})
    write_index(folder, {"some": NEW[0], "other": NEW[1]})


DAMAGES = {
    "nothing": (lambda folder: [file.unlink() for file in folder.glob("*.safetensors*")], "and there are none.$"),
    "a shard is missing": (lambda folder: (folder / NEW[1]).unlink(), f"names {NEW[1]}, which is not there"),
    "half a download": (lambda folder: cut(folder / NEW[1], 5000), f"{NEW[1]} is damaged or incomplete"),
    "empty file": (lambda folder: cut(folder / NEW[0], 0), f"{NEW[0]} is damaged or incomplete"),
    "header too long": (
        lambda folder: (folder / NEW[0]).write_bytes((10**9).to_bytes(8, "little") + b"{}"),
        f"{NEW[0]} is damaged or incomplete",
    ),
    "half an index": (lambda folder: cut(folder / INDEX, 50), "Cannot read .*index.json: .*copy it again"),
    "a list as index": (lambda folder: (folder / INDEX).write_text("[]"), "Expected a JSON object in .*index.json"),
    "an index of nothing": (lambda folder: (folder / INDEX).write_text("{}"), "Expected weight_map and metadata in"),
    "a tensor in two shards": (
        add,
        "both have a tensor model.embed_tokens",
    ),
    "an index of other places": (
        lambda folder: write_index(folder, {MARKED: NEW[0], "lm_head.weight": NEW[1]}),
        f"looks for {MARKED} in {NEW[0]}, but it is in {NEW[1]}",
    ),
    "other names": (lambda folder: rename(folder, INDEX, "other.json"), f"{NEW[0]}, {NEW[1]} is not what transformers"),
    "a weight of another shape": (
        lambda folder: save_file(grown(load_file(folder / NEW[0])), folder / NEW[0], {"format": "pt"}),
        r"Expected model.embed_tokens.weight in .* to have the shape \(300, 64\) .* got \(301, 64\)",
    ),
    "a weight is missing": (lambda folder: save_file({}, folder / NEW[1], {"format": "pt"}), "to have every weight"),
}


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def grown(tensors):
    """Give the embedding another row."""
    tensor = tensors["model.embed_tokens.weight"]
    return tensors | {"model.embed_tokens.weight": torch.cat([tensor, tensor[:1]])}


def rename(folder, old, new):
    (folder / old).rename(folder / new)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(name, folder, tensors):
    write(folder, NEW, tensors, 1.0, INDEX)
    damage, match = DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelError, match=match) as found:
        load_model(str(folder))
    assert "\n" not in str(found.value)


def test_pickles_are_no_bases(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"got pytorch_model.bin in .*pickle format.* Convert it to safetensors"):
        stored_tensors(str(folder))
