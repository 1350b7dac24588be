"""The model card: which base an adapter belongs on, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from ..layer.record import LayerRecord, by_ending, error_reduction
from ..methods.block_training import BlockTraining
from ..methods.distillation import Distillation
from ..methods.method import Method
from ..support.tables import markdown_table

_CARD = """\
---
{front_matter}---

# {family} initialization for {model}, quantized by {quantizer_name}

**This adapter belongs on the quantized base and on no other.** It makes up for the error of
`{quantizer}`.
On the full-precision model, or on a base that was quantized in another way, it *adds* that error. Do not merge it into
full-precision weights: after training, only the change that training made can go there{converted}. Do not merge it into
its quantized base either: the sum is rounded again, which loses the correction.

{purpose}, made by quailora with `{solver}`
weighted by `{metric}`, by the schedule `{schedule}`,
from {tokens} calibration tokens, fitted to the inputs of {network}. {training}

## Load

```python
{snippet}
```

## Train

{advice}

## Layer errors

Mean over the {count} layers, as a share of the output error of the quantized weight alone
(`tr((W - Q - C) H (W - Q - C)^T)`, `H` the second moment of the layer's calibration inputs){before}:

{summary}

The same by kind of layer:

{kinds}

`report.json` has every layer, `config.yaml` the configuration, `quailora.json` the provenance.
"""

_START = "It is a starting point for training"
_MOVED = """\
It holds what a training has changed on another base, besides the correction for this one,
and can be served or trained further"""

_NETWORKS = {
    "full": "the full-precision model",
    "quantized": "the quantized and corrected model, block after block",
    "asymmetric": "the quantized and corrected model and the outputs of the full-precision one, block after block",
}

_FIGURES = """
The figures are from 120 short steps on SmolLM2-135M at rank 16, where plain LoRA did best at a learning rate of 0.0032.
Take them as a hint for other models and longer trainings; docs/worth.md of quailora has all of them."""

_FAMILY = """\
The parameters are not those that PEFT starts with, so that the best learning rate can be another one: try half of the
rate that you would take otherwise, too. `docs/families.md` of quailora has what was measured of each family."""

_CONVERTED = """, and
`quailora convert` writes it as an adapter of its own"""

_FROZEN = """\
The correction is in the first {rank} directions, and the others start as in plain LoRA. The call of `quailora.freeze`
above lets training leave the correction as it is. Train the others at the learning rate that you would take for plain
LoRA, and leave weight decay at 0."""

_MORE = """beside fresh directions:
`frozen_rank` 16 at rank 32 makes such an adapter."""

_WHOLE = f"""\
The factors are not zero, so they learn faster than those of plain LoRA. Their best learning rate was half of that of
plain LoRA, and training undid most of the correction. More was left where the correction stayed as it was, {_MORE}"""

_WHOLE_BASE = f"""\
Do not train these factors at the learning rate of plain LoRA. Recipes that choose the codes can put leading directions
of the weights into the adapter. An adapter of `best-joint` that was trained as a whole ended far behind plain LoRA, and
no better at a quarter of that rate. It ended far ahead where the correction stayed as it was, {_MORE}"""

BESIDE = "path/to/this/folder"
"""Stands for the folder that the card is in."""

_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM{config_import}

base = AutoModelForCausalLM.from_pretrained(
    {arguments}
)
model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)"""

_MANY_BITS = """\
from gptqmodel import GPTQModel
from peft import PeftModel

base = GPTQModel.load({place}).model  # transformers loads no base whose layers have different bits
model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)"""


def model_card(
    method: Method,
    layers: Sequence[LayerRecord],
    *,
    model: str,
    base_model: str,
    calibration_tokens: int,
    quantized_base: str | None = None,
    dtype: str = "auto",
    moved: bool = False,
) -> str:
    """Return the text of an adapter's `README.md`.

    Args:
        method: what made it.
        layers: errors of each layer.
        model: the model as the caller named it.
        base_model: hub name or folder that the base is loaded from.
        calibration_tokens: tokens that it was calibrated on.
        quantized_base: where the base is loaded from, if it is not quantized while it loads.
        dtype: dtype to load the base in, on which codes depend; "auto" is that of the checkpoint.
        moved: whether the adapter also holds what a training has changed.
    """
    initializer = method.initializer
    base = base_of(method)
    share, family = error_reduction(layers), method.family.title
    lora = family == "lora"
    front_matter = {"base_model": base_model, "library_name": "peft", "tags": [family, "quailora"]}
    summary = [
        ["no correction", "100.0%"],
        ["uncalibrated SVD" if lora else "the same family, uncalibrated", f"{share['error_uncalibrated']:.1%}"],
        [
            "**this adapter before its training**" if method.is_trained else "**this adapter**",
            f"**{share['error']:.1%}**",
        ],
    ]
    if lora:
        summary.append(["optimum of this rank (a lower bound in wide layers)", f"{share['error_optimal']:.1%}"])
    # Layers of one kind behave alike in all blocks, so that one line for each kind says where the correction works.
    kinds = [
        [ending, str(len(members)), *(f"{value:.1%}" for value in error_reduction(members).values())]
        for ending, members in by_ending(layers).items()
    ]
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True, width=10**6),
        model=" ".join(model.split()),
        quantizer_name=base,
        quantizer=method.quantizer if method.base is None else base,
        solver=initializer.solver,
        metric=initializer.weighting,
        schedule=initializer.schedule,
        tokens=calibration_tokens,
        network=_NETWORKS[method.inputs] + (f", by the recipe `{method.recipe}`" if method.recipe else ""),
        purpose=_MOVED if moved else _START,
        training="" if moved else trained_how(method),
        advice=advice(method),
        before=", before the training" if method.is_trained else "",
        count=len(layers),
        snippet=loading_snippet(method, base_model, quantized_base, dtype),
        summary=markdown_table(("correction", "output error"), summary),
        kinds=markdown_table(("layers", "count", "SVD" if lora else "uncalibrated", "this adapter", "optimum"), kinds),
        family="LoRA" if lora else family,
        converted=_CONVERTED if lora else "",
    )


def trained_how(method: Method) -> str:
    """Return a few sentences on the training that an adapter has had."""
    if not method.is_trained:
        return "It has not been\ntrained."
    return f"{trained_by_block(method.blocks)}{trained_whole(method.distillation)}It has not been trained on a task."


def trained_by_block(blocks: BlockTraining | None) -> str:
    """Return a sentence on the training of blocks, if there was one."""
    if blocks is None:
        return ""
    parts = " and ".join({"factors": "the adapter"}.get(part, f"{part} of the base") for part in blocks.parts)
    return (
        f"Each block of\nthe model has then been trained to return what it returns in full precision ({parts}): "
        f"{blocks.steps} steps of\n{blocks.tokens} tokens of the calibration text, before the next block was fitted. "
    )


def trained_whole(distillation: Distillation | None) -> str:
    """Return a sentence on the training of the whole model, if there was one."""
    if distillation is None:
        return ""
    purpose = "to predict what full precision does" if distillation.target == "full precision" else "on the text itself"
    kind = "distilled" if distillation.target == "full precision" else "fine-tuned"
    return (
        f"Then it has\nbeen {kind} {purpose}: {distillation.steps} steps of {distillation.batch} x "
        f"{distillation.sequence_length} tokens of the calibration text,\n"
        f"learning rate {distillation.learning_rate:g}. "
    )


def advice(method: Method) -> str:
    """Return what was measured on how to train such a start, as lines of Markdown."""
    if method.family.name != "lora":
        return _FAMILY
    if method.frozen_rank is not None:
        return _FROZEN.format(rank=method.frozen_rank) + _FIGURES
    return (_WHOLE_BASE if method.initializer.schedule.changes_base else _WHOLE) + _FIGURES


def base_of(method: Method) -> str:
    """Return what the base of a method is, in words."""
    if method.base is not None:
        return method.base.title
    others = len(method.quantizers) - len(method.kept)
    own = f", with other bits in {others} layers" if others else ""
    kept = f", {len(method.kept)} layers in full precision" if method.kept else ""
    return f"{type(method.quantizer).__name__}{own}{kept}"


def quoted(text: str) -> str:
    """Return a string as Python code, in double quotes, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def loading_snippet(method: Method, base_model: str, quantized_base: str | None, dtype: str = "auto") -> str:
    """Return Python code that loads the base and the adapter with stock packages."""
    quantizer = method.quantizer if method.base is None else method.base.quantizer
    config = None if quantizer is None else quantizer.stock_config()
    # A base that transformers makes while it loads needs the full-precision model and a configuration. Any other one is
    # a checkpoint by itself.
    snippet = _SNIPPET
    if method.frozen_rank is not None:
        snippet = f"import quailora\n{_SNIPPET}\nquailora.freeze(model, {method.frozen_rank})"
    if len(method.every_quantizer) > 1:
        return _MANY_BITS.format(place=quoted(quantized_base or f"{BESIDE}/base"))
    if quantized_base is not None or config is None:
        place = f"{quoted(quantized_base or f'{BESIDE}/base')}, dtype={quoted(dtype)},"
        remark = "" if quantized_base is not None else "  # which init writes with save_base=True"
        return snippet.format(config_import="", arguments=place + remark)
    inner = ", ".join(f"{key}={value!r}" for key, value in config.items())
    arguments = (
        f"{quoted(base_model)},\n    quantization_config=BitsAndBytesConfig({inner}),\n    dtype={quoted(dtype)},"
    )
    return snippet.format(config_import=", BitsAndBytesConfig", arguments=arguments)
