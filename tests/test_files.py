"""A file is whole or not there, also after a loss of power."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quailora.errors import StorageError
from quailora.support.files import complete_file, write_json, write_tensors


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, {"a": 1}), lambda path: write_tensors(path, {"a": torch.ones(3)})]
)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_is_afterwards(write, tmp_path, monkeypatch):
    path, steps = tmp_path / "file", []
    rename = Path.replace

    def flushed(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("flush", name.name, path.exists(), name.is_dir() or name.stat().st_size > 0))

    def renamed(self, target):
        steps.append(("rename", self.name, path.exists(), self.stat().st_size > 0))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write(path)
    assert steps == [
        ("flush", ".file.partial", False, True),
        ("rename", ".file.partial", False, True),
        ("flush", tmp_path.name, True, True),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_not_complete_is_removed(tmp_path):
    def fail():
        with complete_file(tmp_path / "file") as partial:
            partial.write_text("half", encoding="utf-8")
            raise OSError("no room")

    with pytest.raises(StorageError, match=r"Cannot write .*file: no room\. Make room"):
        fail()
    assert list(tmp_path.iterdir()) == []
