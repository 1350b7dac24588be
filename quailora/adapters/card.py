"""The model card: which base an adapter belongs on, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..initializer import Initializer
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
in the {metric} metric, from {tokens} calibration tokens. It has not been trained.

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

_SNIPPET = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM{config_import}

base = AutoModelForCausalLM.from_pretrained(
    {arguments}
)
model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)"""


def model_card(initializer: Initializer, report: Mapping[str, Any], base_model: str) -> str:
    """Return the text of an adapter's `README.md`.

    Args:
        initializer: what made it.
        report: content of `report.json`.
        base_model: hub name or folder of the base.
    """
    share = report["mean_error_share"]
    rows = [
        ["no correction", "100.0 %"],
        ["uncalibrated SVD", f"{share['error_uncalibrated']:.1%}"],
        ["**this adapter**", f"**{share['error']:.1%}**"],
        ["optimum of this rank", f"{share['error_optimal']:.1%}"],
    ]
    return _CARD.format(
        base_model=base_model,
        model=report["model"],
        quantizer_name=type(initializer.quantizer).__name__,
        quantizer=initializer.quantizer,
        solver=initializer.solver,
        metric=initializer.metric,
        tokens=report["calibration_tokens"],
        count=len(report["layers"]),
        snippet=loading_snippet(initializer, base_model),
        summary=markdown_table(("correction", "output error"), rows),
        kinds=markdown_table(("layers", "count", "SVD", "this adapter", "optimum"), kinds_of_layers(report["layers"])),
    )


def kinds_of_layers(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return one row for each ending of a layer name: mean error shares over the layers with that ending."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    rows = []
    for ending, members in groups.items():
        damaged = [layer for layer in members if layer["error_none"] > 0]
        shares = [
            sum(layer[key] / layer["error_none"] for layer in damaged) / max(1, len(damaged))
            for key in ("error_uncalibrated", "error", "error_optimal")
        ]
        rows.append([ending, str(len(members)), *(f"{share:.1%}" for share in shares)])
    return rows


def loading_snippet(initializer: Initializer, base_model: str) -> str:
    """Return Python code that loads the base and the adapter with stock packages."""
    config = initializer.quantizer.stock_config()
    if config is None:
        # Stock transformers cannot quantize this way: the base was saved dequantized, if it was saved.
        return _SNIPPET.format(config_import="", arguments='"path/to/this/folder/base",  # written by --save-base')
    inner = ", ".join(f"{key}={value!r}" for key, value in config.items())
    arguments = f'"{base_model}",\n    quantization_config=BitsAndBytesConfig({inner}),\n    dtype=torch.bfloat16,'
    return _SNIPPET.format(config_import=", BitsAndBytesConfig", arguments=arguments)
