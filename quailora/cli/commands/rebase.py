"""`quailora rebase`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...support.choices import (
    BaseFormat,
    BosPlacement,
    CalibrationDtype,
    DeviceName,
    DtypeName,
    FactorsDtype,
    Offload,
    StrPath,
)
from ..components import Component


def rebase(
    adapter: StrPath,
    *,
    out: StrPath,
    initial: StrPath | None = None,
    base: StrPath | None = None,
    quantizer: Component | None = None,
    model: StrPath | None = None,
    rank: int | None = None,
    recipe: str = "best",
    trained_on: StrPath | None = None,
    factors_dtype: FactorsDtype = "float32",
    calibration: StrPath | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = 32,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    offload: Offload = "auto",
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
    save_base: bool = False,
    base_format: BaseFormat = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    push_to_hub: str | None = None,
) -> Any:
    """Move a trained adapter onto another quantized base, without training.

    Each layer gets the correction that brings the other base close to the full-precision weights with what training
    has changed. The change and the compensation of the other base share the rank.

    Args:
        adapter: hub name or folder of the trained adapter, as PEFT saved it.
        out: folder for the adapter.
        initial: folder of the adapter that the training started from. By default it is read from the frozen directions
            of the trained adapter, or looked for in the folders around it. "zero" says that it added nothing before its
            training, as plain LoRA does.
        base: the other base, a checkpoint that is quantized already: of bitsandbytes in 4 or 8 bits, GPTQ, AWQ, HQQ, or
            torchao in 8 bits.
        quantizer: makes the other base of the full-precision model, in place of a checkpoint; `quailora list` names
            them. A base that stock transformers does not make while it loads is written to the folder base in `--out`.
        model: the full-precision model; by default what the adapter notes.
        rank: rank of the adapter; that of the trained one by default. Twice the rank has room for both changes.
        recipe: how corrections are found; `quailora list` names them. Those that write their own base are refused.
        trained_on: the quantized base that the adapter was trained on, for families whose change depends on it, such as
            DoRA: a checkpoint or the name of a quantizer such as nf4; by default what the adapter notes.
        factors_dtype: dtype that the adapter is stored in.
        calibration: text of the task: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such
            files, or the hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, see `quailora init --help`.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each window with the tokens that the tokenizer puts in front of a text, such as BOS;
            "stream" only the first.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, see `quailora init`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        offload: "always" leaves the weights on disk, see `quailora init`.
        memory_limit: how much memory to use, see `quailora init`.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        save_base: also write a base that stock transformers makes while it loads.
        base_format: format of a base that is written, see `quailora init`.
        overwrite: replace a result that is in the folder.
        fresh: forget what an unfinished run with this output folder has done, instead of going on from it.
        push_to_hub: name on the hub to upload the result to; a new repository is private.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..merging import run_rebase

    return run_rebase(options | {"quantizer": None if quantizer is None else quantizer.made("quantizer")})
