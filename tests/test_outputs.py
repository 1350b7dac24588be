"""Folders that are replaced as a whole or not at all, and requests that are refused before a model is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import init
from runs import SMALL, Killed, content, small_run

from quailora import Int8
from quailora.core.weightings import FisherWeighting
from quailora.errors import ConfigurationError, OutputExistsError, StorageError
from quailora.support import files as outputs
from quailora.support.files import new_folder


@pytest.mark.parametrize("when", ["written", "moved aside", "moved in", "removed"])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, when):
    """Killed at any point, the old folder or the new one is there, and nothing is left after the next run."""
    out = tmp_path / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "report.json"):
        write(out, name, "old")
    calls = {
        "written": ("exchange", 0),
        "moved aside": ("rename", 0),
        "moved in": ("rename", 1),
        "removed": ("rmtree", 0),
    }

    def fill(text):
        with new_folder(out, overwrite=True) as partial:
            write(partial, "adapter_config.json", text)
            write(partial, "adapter_model.safetensors", text)

    with monkeypatch.context() as patch:
        name, after = calls[when]
        place = {"exchange": outputs, "rename": Path, "rmtree": shutil}[name]
        left = [after]

        original = getattr(place, name)

        def killed(*arguments, **options):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return original(*arguments, **options)

        patch.setattr(outputs.shutil, "rmtree", lambda *_, **__: None)  # nothing is swept by a killed process
        patch.setattr(place, name, killed)
        with pytest.raises(Killed):
            fill("new")
    there = out if out.exists() else outputs._beside(out, "old")
    found = {path.name: path.read_text(encoding="utf-8") for path in there.iterdir()}
    assert len(set(found.values())) == 1
    assert len(found) == (3 if "old" in found.values() else 2)
    fill("newer")
    assert {path.read_text(encoding="utf-8") for path in out.iterdir()} == {"newer"}
    assert list(tmp_path.iterdir()) == [out]


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def killed():
    raise Killed


def test_the_current_folder_is_filled(tiny_llama, tmp_path, monkeypatch):
    """It cannot be replaced, and what else is in it stays. Until it is complete, it is no adapter."""
    here = tmp_path / "here"
    write(here, "notes.txt", "mine")
    monkeypatch.chdir(here)
    small_run(tiny_llama, ".")
    small_run(tiny_llama, tmp_path / "there")
    assert content(here) == content(tmp_path / "there")
    assert (here / "notes.txt").read_text(encoding="utf-8") == "mine"
    before = content(here)
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "move", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(StorageError, match="No space left"):
            small_run(tiny_llama, ".", rank=2, overwrite=True)
    assert content(here) == before  # the older result is whole until all of the new one is in the folder
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda old, new: killed() if old.suffix == ".new" else rename(old, new))
        with pytest.raises(Killed):
            small_run(tiny_llama, ".", rank=2, overwrite=True)
    assert not (here / "adapter_config.json").exists()
    small_run(tiny_llama, ".", rank=2)
    small_run(tiny_llama, tmp_path / "there", rank=2, overwrite=True)
    assert content(here) == content(tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("", "got an empty path"),
        ("/", "Name a folder inside"),
        ("x" * 250, "File name too long"),
        ("a\0b", "got 'a"),
        ("file/adapter", r"file is a file\. Choose"),
        ("file", "file is a file"),
        ("/proc/adapter", "Cannot write /proc/adapter|read-only"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_places_that_cannot_be_written_to(tiny_llama, tmp_path, monkeypatch, out, told, dry_run):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    if dry_run and out.startswith("/proc"):
        pytest.skip("nothing is tried")
    with pytest.raises((ConfigurationError, StorageError, OutputExistsError), match=told):
        init(tiny_llama, out=out, dry_run=dry_run, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes(tiny_llama, tmp_path, seed):
    with pytest.raises(ConfigurationError, match=f"Expected a seed from 0 to .*, got {seed}"):
        init(tiny_llama, out=tmp_path / "out", dry_run=True, **SMALL, seed=seed)


def test_a_recipe_that_the_quantizer_cannot_follow(tiny_llama, tmp_path):
    with pytest.raises(ConfigurationError, match=r"Int8\(\) rounds in one way only"):
        init(tiny_llama, out=tmp_path / "out", dry_run=True, quantizer=Int8(), recipe="best-joint", **SMALL)
    with pytest.raises(ConfigurationError, match="keeps the correlations between inputs, got FisherWeighting"):
        init(tiny_llama, out=tmp_path / "out", dry_run=True, metric=FisherWeighting(), inputs="asymmetric", **SMALL)
