"""The valid inputs that the fuzzer changes: a model, adapters, bases, an unfinished run, texts; and what they give."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from families import save_llama
from safetensors.torch import load_file, save_file

SMALL = ("--rank", "4", "--samples", "4", "--sequence-length", "32")
WINDOWS = ("--windows", "2", "--sequence-length", "64")

_STOP_AFTER = """
import os, pathlib, sys
count = 0
def counted(original):
    def replace(*arguments, **named):
        global count
        count += 1
        if count > {renames}:
            os._exit(9)
        return original(*arguments, **named)
    return replace
pathlib.Path.replace, os.replace = counted(pathlib.Path.replace), counted(os.replace)
from quailora.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""A program that runs quailora and is gone before it renames one file too many."""


@dataclass(frozen=True)
class Shop:
    """Valid inputs. Nothing in here is changed; the fuzzer copies what it wants to change.

    Attributes:
        folder: where everything is.
    """

    folder: Path

    @classmethod
    def furnish(cls, folder: Path) -> Shop:
        """Make everything."""
        shop = cls(folder.resolve())
        save_llama(shop.model, _tokenizer(), num_key_value_heads=2, tie_word_embeddings=True)
        shop.init(shop.adapter)
        shop.init(shop.folder / "gptq", "--quantizer", "gptq", "--save-base")
        shop.init(shop.folder / "four-bit", "--save-base")
        shop.init(shop.folder / "whole", *shop.unfinished_options)
        shop.stop_after(shop.folder / "half", 20)
        text = "The sea was calm that morning, and nobody on board thought of the reef. "
        records = [{"text": f"{number}: {text * 4}", "id": number} for number in range(60)]
        shop.records.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        evaluated = shop.folder / "evaluated.json"
        shop.must("evaluate", shop.model, "--adapter", shop.adapter, *WINDOWS, "--json", evaluated)
        compared = (
            "--recipes",
            "lorc",
            "--ranks",
            "2",
            "--baselines",
            "int8",
            "--window-length",
            "64",
            "--windows",
            "2",
        )
        shop.must("compare", shop.model, "--out", shop.comparison, *compared, *SMALL[2:])
        return shop

    @property
    def model(self) -> Path:
        """A model."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """An adapter for a base that is quantized while it loads."""
        return self.folder / "adapter"

    @property
    def comparison(self) -> Path:
        """A finished comparison."""
        return self.folder / "comparison"

    @property
    def records(self) -> Path:
        """Text as JSON lines."""
        return self.folder / "records.jsonl"

    @property
    def unfinished_options(self) -> tuple[str, ...]:
        """What the run was asked for that was stopped half way; `whole` is what it gives."""
        return ("--inputs", "quantized", "--quantizer", "uniform", "--save-base")

    def init(self, out: Path, *options: object) -> None:
        """Make an adapter."""
        self.must("init", self.model, "--out", out, *SMALL, *options)

    def must(self, *arguments: object) -> None:
        """Run a command that has to succeed."""
        from fuzz import call

        ended = call(arguments)
        if ended.status != 0:
            raise RuntimeError(f"{arguments} ended with {ended.status}: {ended.output}{ended.error}")

    def stop_after(self, out: Path, renames: int) -> None:
        """Start a run in a process of its own that dies after some files are written."""
        code = _STOP_AFTER.format(renames=renames)
        arguments = ["init", self.model, "--out", out, *SMALL, *self.unfinished_options]
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 9 or not out.with_name(f"{out.name}.partial").is_dir():
            raise RuntimeError(f"Expected an unfinished run, got {done.returncode}: {done.stdout}{done.stderr}")

    def trained(self, folder: Path) -> None:
        """Write the adapter as a training would leave it: the same files with other factors."""
        shutil.copytree(self.adapter, folder)
        file = folder / "adapter_model.safetensors"
        save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _tokenizer() -> object:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    text = (Path(__file__).parents[1] / "quailora" / "data" / "calibrate.txt").read_text(encoding="utf-8")
    trained.train_from_iterator([text], vocab_size=300, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
