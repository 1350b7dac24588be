"""`quailora evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...support.choices import BosPlacement, DeviceName, DtypeName, StrPath
from ..components import Component


def evaluate(
    model: StrPath,
    *,
    text: StrPath | None = None,
    text_fields: Sequence[str] = (),
    quantizer: Component | None = None,
    base: StrPath | None = None,
    adapter: StrPath | None = None,
    any_base: bool = False,
    calibration: StrPath | None = None,
    windows: int = 10,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
    json: StrPath | None = None,
) -> Any:
    """Measure perplexity in full precision, quantized, and quantized with an adapter.

    Every linear layer but the output head is quantized, or a base that is there is loaded; the adapter is attached by
    stock PEFT. The base has to be the one that the adapter was made for, as its folder says.

    Args:
        model: hub name, folder, .gguf file, or "demo".
        text: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the hub name of
            a data set, to measure on; the shipped text by default. Do not use the calibration text.
        text_fields: fields of a record that are the text, see `quailora init --help`.
        quantizer: quantizes the base; by default the one the adapter was made for, or NF4 without adapter.
        base: a checkpoint to measure on, in place of a quantizer; by default the one that stands beside the adapter, or
            that it was made for.
        adapter: hub name or folder of an adapter, trained or not.
        any_base: measure the adapter on another base than the one it was made for, too.
        calibration: calibration text for a quantizer that needs it; needed if the adapter was made with a text of
            its own.
        windows: number of windows at most.
        sequence_length: tokens in a window; 2048 by default, or all positions that the model has.
        bos: "every-window" starts each window with the tokens that the tokenizer puts in front of a text,
            such as BOS; "stream" only the first, as in the GPTQ papers. Without meaning for tokenizers that add none.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        json: file to write the result to.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..measuring import run_evaluate

    return run_evaluate(options | {"quantizer": None if quantizer is None else quantizer.made("quantizer")})
