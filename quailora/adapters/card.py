"""The model card: which base an adapter belongs on, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from ..initializer import Initializer
from ..report.record import LayerRecord, by_ending, error_reduction
from ..report.tables import markdown_table

_CARD = """\
---
base_model: {base_model}
library_name: peft
tags: [lora, quailora]
---

# LoRA initialization for {model}, quantized by {quantizer_name}

**This adapter belongs on the quantized base and on no other.** It makes up for the error of
`{quantizer}`.
On the full-precision model, or on a base that was quantized in another way, it *adds* that error. Do not merge it into
full-precision weights: after training, only the change that training made can go there.

It is a starting point for training, made by quailora with `{solver}`
in the {metric} metric, by the schedule `{schedule}`,
from {tokens} calibration tokens, fitted to the inputs of {network}. It has not been
trained.

## Load

```python
{snippet}
```

## Layer errors

Mean over the {count} layers, as a share of the output error of the quantized weight alone
(`tr((W - Q - C) H (W - Q - C)^T)`, `H` the second moment of the layer's calibration inputs):

{summary}

The same by kind of layer:

{kinds}

`report.json` has every layer, `config.yaml` the configuration, `quailora.json` the provenance.
"""

_NETWORKS = {
    "full": "the full-precision model",
    "quantized": "the quantized and corrected model, block after block",
    "asymmetric": "the quantized and corrected model and the outputs of the full-precision one, block after block",
}

BESIDE = "path/to/this/folder"
"""Stands for the folder that the card is in."""

_SNIPPET = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM{config_import}

base = AutoModelForCausalLM.from_pretrained(
    {arguments}
)
model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)"""


def model_card(
    initializer: Initializer,
    layers: Sequence[LayerRecord],
    *,
    model: str,
    base_model: str,
    calibration_tokens: int,
    inputs: str = "full",
    quantized_base: str | None = None,
) -> str:
    """Return the text of an adapter's `README.md`.

    Args:
        initializer: what made it.
        layers: errors of each layer.
        model: the model as it was asked for.
        base_model: hub name or folder that the base is loaded from.
        calibration_tokens: tokens that it was calibrated on.
        inputs: whose inputs layers are fitted to; see `Walk`.
        quantized_base: where the base is loaded from, if it is not quantized while it loads.
    """
    share = error_reduction(layers)
    summary = [
        ["no correction", "100.0%"],
        ["uncalibrated SVD", f"{share['error_uncalibrated']:.1%}"],
        ["**this adapter**", f"**{share['error']:.1%}**"],
        ["optimum of this rank", f"{share['error_optimal']:.1%}"],
    ]
    kinds = [
        [ending, str(len(members)), *(f"{value:.1%}" for value in error_reduction(members).values())]
        for ending, members in by_ending(layers).items()
    ]
    return _CARD.format(
        base_model=base_model,
        model=model,
        quantizer_name=type(initializer.quantizer).__name__,
        quantizer=initializer.quantizer,
        solver=initializer.solver,
        metric=initializer.metric,
        schedule=initializer.schedule,
        tokens=calibration_tokens,
        network=_NETWORKS[inputs],
        count=len(layers),
        snippet=loading_snippet(initializer, base_model, quantized_base),
        summary=markdown_table(("correction", "output error"), summary),
        kinds=markdown_table(("layers", "count", "SVD", "this adapter", "optimum"), kinds),
    )


def loading_snippet(initializer: Initializer, base_model: str, quantized_base: str | None) -> str:
    """Return Python code that loads the base and the adapter with stock packages."""
    config = initializer.quantizer.stock_config()
    if quantized_base is not None or config is None:
        place = f'"{quantized_base or f"{BESIDE}/base"}", dtype=torch.bfloat16,'
        remark = "" if quantized_base is not None else "  # written by --save-base"
        return _SNIPPET.format(config_import="", arguments=place + remark)
    inner = ", ".join(f"{key}={value!r}" for key, value in config.items())
    arguments = f'"{base_model}",\n    quantization_config=BitsAndBytesConfig({inner}),\n    dtype=torch.bfloat16,'
    return _SNIPPET.format(config_import=", BitsAndBytesConfig", arguments=arguments)
