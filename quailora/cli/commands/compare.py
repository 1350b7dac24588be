"""`quailora compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ...support.choices import BosPlacement, CalibrationDtype, DeviceName, DtypeName
from ..components import Component


def compare(
    model: str,
    *,
    out: str,
    recipes: Sequence[str] = ("all",),
    ranks: Sequence[int] = (16,),
    families: Sequence[str] = ("lora",),
    equal: Literal["numbers", "bytes", "defaults"] = "numbers",
    quantizer: Component = Component("nf4"),  # noqa: B008 # frozen
    against: str = "quailora",
    baselines: Sequence[str] = ("int8", "6-bit", "5-bit", "4-bit", "3-bit"),
    text: Sequence[str] = (),
    text_fields: Sequence[str] = (),
    windows: int = 10,
    window_length: int | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    task_limit: int | None = None,
    calibration: str | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
    fresh: bool = False,
) -> Any:
    """Compare methods on the same calibration data: perplexity, divergence, bytes and seconds.

    Every finished row is kept, so a comparison that was interrupted goes on, and recipes, ranks and baselines that are
    named later join those in the folder.
    Writes results.json, results.csv, results.md and report.html. `quailora init --recipe` gives the adapter of a row.

    Args:
        model: hub name, folder, .gguf file, or "demo"; it is held in memory.
        out: folder for the results.
        recipes: names that `quailora list` shows, or "all".
        ranks: ranks of the adapters.
        families: kinds of adapters by PEFT's names in lower case, or "all"; LoRA is always among them. Each is about as
            large as LoRA of each rank.
        equal: what is as large: the "numbers" that are trained, or the "bytes" of the file; "defaults" takes PEFT's
            default sizes.
        quantizer: the quantizer of the base.
        against: the recipe that differences are taken from, by LoRA at the same rank.
        baselines: other bases to measure without an adapter: int8, and round to nearest in groups of 64 with 6, 5, 4
            or 3 bits. Gaps are closed towards int8.
        text: files, folders or data sets to evaluate on, likewise; the shipped text by default. Do not use the
            calibration text.
        text_fields: fields of a record that are the text, likewise.
        windows: windows of each text at most.
        window_length: tokens in such a window; 2048 by default, or all positions that the model has.
        tasks: also score every row on these tasks of lm-eval, which has to be installed.
        task_folder: folder with more tasks, as YAML files of lm-eval.
        task_limit: examples of each task at most.
        calibration: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the
            hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, see `quailora init --help`.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each window, of calibration and of evaluation, with the tokens that the tokenizer
            puts in front of a text, such as BOS; "stream" only the first, as in the GPTQ papers. Without meaning for
            tokenizers that add none.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, see `quailora init`.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        fresh: forget earlier results in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ...support.settings import as_command
    from ..measuring import run_compare

    made = options | {"quantizer": quantizer.made("quantizer")}
    return run_compare(made, as_command(compare, made))
