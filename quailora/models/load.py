"""Load a Hugging Face causal language model: hub name, folder, `.gguf` file, or the demo."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..errors import ConfigurationError, ModelError
from ..support.choices import DeviceName as DeviceName  # noqa: PLC0414 # imported from here, too
from ..support.choices import DtypeName as DtypeName  # noqa: PLC0414 # imported from here, too
from .accept import check_loaded, check_weights, find_config, skeleton, unreadable
from .locate import NO_ADAPTER, quiet_transformers, resolve
from .quantized import already_quantized
from .weights import compute_on

logger = logging.getLogger("quailora")

_SHARD = "2GB"


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
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model in full precision and its tokenizer, without any adapter that lies beside it.

    Args:
        model: hub name, folder, `.gguf` file, or `demo`.
        dtype: "auto" keeps the dtype of the checkpoint, but for float16 on a CPU, which becomes float32.
        device: "auto" is the GPU where there is one.
        offload: leave weights on disk, in the checkpoint's own files; this folder gets those that transformers has to
            convert first. In memory if None.
        allow_pickle: accept checkpoints in PyTorch's pickle format, which can run any code while they are read.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.

    Raises:
        ConfigurationError: if the device is not there.
        ModelError: if the model cannot be found or read, is quantized already, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve_device(device)
    name = resolve(model)
    config = find_config(model, name, trust_remote_code)
    check_weights(model, name, skeleton(model, config, trust_remote_code), allow_pickle)
    wanted: Any = dtype_for(dtype, config, where) or "auto"
    if wanted == torch.float32 and dtype == "auto":
        logger.info("Computing in float32: float16 is many times slower on a CPU.")
    place: dict[str, Any] = {"device_map": {"": where}} if where != "cpu" else {}  # past the machine's own memory
    if offload:
        place = {"device_map": {"": "disk"}, "offload_folder": str(offload)}
    try:
        with quiet_transformers():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=wanted,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                adapter_kwargs=NO_ADAPTER,
                trust_remote_code=trust_remote_code,
                **place,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds, down to those of its file formats
        raise unreadable(model, error) from error
    check_loaded(model, loaded, report)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(model, error, "tokenizer") from error
    if offload:
        compute_on(loaded, where)
    return LoadedModel(loaded.eval(), tokenizer, name)


def resolve_device(device: str) -> Literal["cpu", "cuda"]:
    """Return the device that `auto` means here.

    Raises:
        ConfigurationError: if the device is not there, or of a kind that is not supported.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise ConfigurationError(
            f"Expected the device auto, cpu or cuda, got {device!r}. Try cpu, which works everywhere."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "Expected a CUDA device, and PyTorch finds none. Pass `device='cpu'`, or install a build of PyTorch for "
            "your GPU."
        )
    return "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"


def dtype_for(dtype: DtypeName, config: Any, device: str) -> torch.dtype | None:
    """Return the dtype that a model is loaded in; None for that of its checkpoint.

    Args:
        dtype: the one that was asked for; see `load_model`.
        config: configuration of the model.
        device: kind of device that computes, "cpu" or another one.
    """
    if dtype == "auto":
        return torch.float32 if device == "cpu" and config.dtype == torch.float16 else None
    found: torch.dtype = getattr(torch, dtype)
    return found


def empty_model(model: str, dtype: DtypeName = "auto", *, device: str = "", trust_remote_code: bool = False) -> Any:
    """Return a model without weights, from its configuration alone; see `load_model`.

    Args:
        model: hub name or folder.
        dtype: the dtype that was asked for.
        device: kind of device that will compute; without it, "auto" means the dtype of the checkpoint.
        trust_remote_code: run the Python code that a model brings along.
    """
    config = find_config(model, resolve(model), trust_remote_code)
    return skeleton(model, config, trust_remote_code, dtype_for(dtype, config, device))


def save_model(folder: Path, loaded: LoadedModel, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the checkpoint and the tokenizer, one shard in memory at a time.

    Args:
        folder: the folder to write to.
        loaded: the model, in memory or on disk.
        state: its tensors, where they are not those of the model; on the device "meta" where they wait on disk.
    """
    model = loaded.model
    tied = model.all_tied_weights_keys  # those on disk, transformers would write twice
    state = {name: tensor for name, tensor in (state or model.state_dict()).items() if name not in tied}
    with quiet_transformers(), warnings.catch_warnings(action="ignore"):  # of shards larger than memory
        model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
    loaded.tokenizer.save_pretrained(folder)


def empty_copy(model: Any) -> Any:
    """Return a model without weights of the same class and configuration as one in memory.

    Raises:
        ModelError: if it is no causal language model of transformers, or its weights are quantized.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(
            f"Expected a causal language model of transformers, its name or its folder, got {type(model).__name__}. "
            "For a model with a PEFT adapter there is quailora.initialize."
        )
    if getattr(model, "quantization_method", None) is not None:
        raise already_quantized(str(model.name_or_path), str(model.quantization_method))
    with torch.device("meta"):
        return type(model)(model.config).to(model.dtype).eval()


def model_in_memory(model: Any, tokenizer: Any = None) -> LoadedModel:
    """Return a model that the caller has loaded, in evaluation mode, with the tokenizer of the same name.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; loaded from the place that the model was loaded from if None, and left out if there is
            none.
    """
    from transformers import AutoTokenizer

    name = str(model.name_or_path)
    if tokenizer is None and name:
        with suppress(Exception):  # only text needs one, and says so
            tokenizer = AutoTokenizer.from_pretrained(name)
    return LoadedModel(model, tokenizer, name)
