"""What a run may use, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..support.choices import BaseFormat, DeviceName, DtypeName, FactorsDtype, Offload, StrPath


@final
@dataclass(frozen=True)
class Resources:
    """What of the machine a run uses, and what it may read.

    Attributes:
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        offload: "always" leaves the weights on disk and holds one block in memory at a time, "never" holds the whole
            model; "auto" does so where it fits.
        memory_limit: how much memory of the device that computes to use, such as 8GiB; four fifths of what is free if
            None.
        allow_pickle: accept a checkpoint in PyTorch's pickle format, which can run any code while it is read.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
    """

    dtype: DtypeName = "auto"
    device: DeviceName = "auto"
    offload: Offload = "auto"
    memory_limit: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


@final
@dataclass(frozen=True)
class Output:
    """What a run writes.

    Attributes:
        folder: the folder to write the adapter to.
        overwrite: replace a result that is in the folder.
        fresh: forget what an unfinished run with this folder has done, instead of going on from it.
        save_base: also write the base, for quantizers that stock transformers cannot apply while it loads.
        base_format: format of the base: "auto" is packed as transformers reads it, where there is such a format; "awq"
            is AutoAWQ's for 4-bit codes of `GPTQ` and `Uniform`, which vLLM reads with any zero points; "dequantized"
            needs no package to load.
        factors_dtype: dtype that the adapter is stored in. In bfloat16 twice the rank takes as many bytes, which closes
            more of the error. PEFT makes float32 of it when it loads it.
        modules_to_save: modules that training shall change as a whole beside the adapter, as in PEFT.
        push_to_hub: name on the hub to upload the result to; a new repository is private.
        model: whether the folder is to hold a model without an adapter.
    """

    folder: StrPath
    overwrite: bool = False
    fresh: bool = False
    save_base: bool = False
    base_format: BaseFormat = "auto"
    factors_dtype: FactorsDtype = "float32"
    modules_to_save: tuple[str, ...] = ()
    push_to_hub: str | None = None
    model: bool = False
