"""`quailora merge`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ...support.choices import (
    BaseFormat,
    BosPlacement,
    CalibrationDtype,
    DeviceName,
    DtypeName,
    Offload,
    StrPath,
)
from ..components import Component


def merge(
    adapter: StrPath,
    *,
    out: StrPath,
    into: Component = Component("nf4"),  # noqa: B008 # frozen
    initial: StrPath | None = None,
    model: StrPath | None = None,
    trained_on: StrPath | None = None,
    target: Literal["trained", "full"] = "trained",
    text: Sequence[str] = (),
    text_fields: Sequence[str] = (),
    windows: int = 8,
    window_length: int | None = None,
    max_kl: float | None = None,
    block_steps: int = 200,
    scale_steps: int = 200,
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
    base_format: BaseFormat = "auto",
    overwrite: bool = False,
    fresh: bool = False,
) -> Any:
    """Write a trained model as a quantized checkpoint that needs no adapter.

    The codes are chosen with error feedback on the inputs of the trained model, and then codes and scales are trained.
    Rounding to nearest, as PEFT's merge_and_unload does, loses what is smaller than a step of the codes. The model's
    README.md says how far it is from the unmerged model, and how far the other ways are.

    Args:
        adapter: hub name or folder of the trained adapter, as PEFT saved it.
        out: folder for the model.
        into: the format: nf4 and int8 for bitsandbytes, gptq with `--into.bits 4` for AutoGPTQ's.
        initial: folder of the adapter that the training started from. By default it is read from the frozen directions
            of the trained adapter, or looked for in the folders around it. "zero" says that it added nothing before its
            training, as plain LoRA does.
        model: the full-precision model; by default what the adapter notes.
        trained_on: the quantized base that the adapter was trained on, a checkpoint or the name of a quantizer such as
            nf4; by default what the adapter notes.
        target: what the merged model comes close to: "trained" is the base with the adapter on it, "full"
            the full-precision weights with what training has changed.
        text: files, folders or data sets to measure the merged model on; the shipped text by default.
        text_fields: fields of a record that are the text, see `quailora init --help`.
        windows: windows of each text at most; 0 measures nothing.
        window_length: tokens in such a window; 512 by default, or all positions that the model has.
        max_kl: write nothing if the divergence from the unmerged model is larger, in nats a token.
        block_steps: updates of a training of codes and scales, one block of the model after the other, which brings
            the outputs of each block closer to those of the trained model; 0 trains no codes.
        scale_steps: updates of a training of all scales together, which follows and brings the predictions closer to
            those of the trained model. The model has to be in memory for it; 0 leaves it out.
        calibration: text of the task: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such
            files, or the hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, see `quailora init --help`.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each window with the tokens that the tokenizer puts in front of a text, such as BOS;
            "stream" only the first.
        seed: seed of the draw of windows.
        calibration_dtype: arithmetic of the calibration pass, see `quailora init`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        offload: "always" leaves the weights on disk, see `quailora init`. What is measured is held in memory.
        memory_limit: how much memory to use, see `quailora init`.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        base_format: "auto" packs the weights as transformers reads them, "awq" packs 4-bit codes of gptq so that vLLM
            reads them, too, and "dequantized" writes the weights in floating point.
        overwrite: replace a merged model that is in the folder.
        fresh: forget what an unfinished run with this output folder has done, instead of going on from it.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..merging import run_merge

    return run_merge(options | {"into": into.made("into")})
