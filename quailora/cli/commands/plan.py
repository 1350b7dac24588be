"""`quailora plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ...support.choices import (
    PLANNED_BITS,
    PLANNED_GROUP_SIZES,
    PLANNED_LENGTH,
    PLANNED_RANKS,
    PLANNED_SAMPLES,
    BosPlacement,
    CalibrationDtype,
    DeviceName,
    DtypeName,
    StrPath,
)


def plan(
    model: StrPath,
    *,
    out: StrPath,
    budget: str | None = None,
    quality: float | None = None,
    format: Literal["gptq", "bitsandbytes"] = "gptq",  # noqa: A002 # the name of the option
    bits: Sequence[int] = PLANNED_BITS,
    ranks: Sequence[int] = PLANNED_RANKS,
    group_sizes: Sequence[int] = PLANNED_GROUP_SIZES,
    recipe: Literal["best-joint", "best"] | None = None,
    symmetric: bool = False,
    fused: bool = False,
    measurements: StrPath | None = None,
    calibration: StrPath | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = PLANNED_SAMPLES,
    sequence_length: int | None = PLANNED_LENGTH,
    bos: BosPlacement = "every-window",
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    fresh: bool = False,
) -> Any:
    """Choose bits, ranks and layers in full precision together, for a number of bytes.

    One walk through the model quantizes and corrects every layer in every way. Backward passes on held-out text, from
    words that the model draws itself, then show what the error of each choice costs in its predictions. An integer
    programme chooses for all layers at once. What was measured stays when a run is killed, and other budgets take no
    measuring. While it measures, the folder holds about 15 bytes for each weight. `quailora init --plan` makes the
    model. Writes plan.json, measurements.json, frontier.csv and frontier.svg.

    Args:
        model: hub name, folder, .gguf file, or "demo"; it is held in memory.
        out: folder for the plan.
        budget: what the model may take: 3.5bits for each weight of its linear layers, adapters included, or 2GiB for
            all of it. Adapters count in 16 bits.
        quality: in place of a budget, the divergence of the predictions from full precision that the model may have, in
            nats per token; the plan is the smallest one that is expected to stay below.
        format: the checkpoint that the base becomes. "gptq" has bits of its own for each layer, and is loaded by
            gptqmodel; "bitsandbytes" is NF4, with some layers in 16 bits, and is loaded by transformers.
        bits: bits to choose from; by default all that the format holds, which are 4 and 16 for bitsandbytes. Layers of
            16 bits stay as they are, without an adapter.
        ranks: ranks to choose from; 0 is no adapter. Leave 0 out where every quantized layer shall be trained later.
        group_sizes: columns that share a scale in a base of gptq. Layers of 4 bits can have any of these sizes, those
            of 3 bits have the largest, those of 2 bits the largest up to 32, and those of 8 bits one scale a row.
        recipe: what the plan is for. "best-joint" writes a base whose rounding is chosen together with the adapter,
            "best" keeps the rounding of the quantizer alone; by default best-joint, except where all layers are NF4,
            which stay as bitsandbytes makes them while it loads a model.
        symmetric: levels that are symmetric around zero in a base of gptq, as vLLM needs them, at a loss of accuracy.
        fused: quantize layers alike that serving engines compute as one: query, key and value; gate and up.
        measurements: folder or file of an earlier plan, whose measurements are taken in place of new ones. Bits and
            ranks can then be some of those that were measured.
        calibration: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the
            hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, see `quailora init --help`.
        calibration_split: split of a data set.
        samples: number of calibration windows, of which every fourth is held out.
        sequence_length: tokens in a calibration window.
        bos: see `quailora init --help`.
        seed: seed of the draw of windows.
        calibration_dtype: arithmetic of the calibration pass, see `quailora init --help`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        overwrite: replace a plan that is in the folder.
        fresh: forget what an unfinished measurement in this folder has done, instead of going on from it.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..planning import run_plan

    return run_plan(options)
