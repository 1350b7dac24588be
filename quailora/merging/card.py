"""The card of a merged model: what is in it, how good it is, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .certificate import Certificate

_CARD = """\
---
{front_matter}---

# {model} with what training has changed, quantized

The change of the adapter `{adapter}` is in these weights, so that no adapter is needed. An adapter that was made for
another base does not belong on them. quailora has quantized them to {bits:.2f} bits per weight as `{format}`.
{training}

## How far it is from the unmerged model

{certificate}

## Load

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
```

{loading}
`merge.json` has every number, with the error of each layer.
"""

_LOADING = {
    "gptq": "This needs the packages gptqmodel and optimum. {vllm}\n",
    "awq": "This needs the package gptqmodel. vLLM loads it as it is.\n",
    "bitsandbytes": "This needs the package bitsandbytes.\n",
}

_SYMMETRIC = "vLLM loads it as it is."
_ASYMMETRIC = (
    "vLLM takes this format only with symmetric levels of 4 or 8 bits; the base format `awq` holds any levels of 4 "
    "bits so that it loads them."
)

_UNMEASURED = "This was not measured."

_MEANING = """\
The unmerged model is the quantized base with the trained adapter on it. KL is the mean over tokens of the divergence
of the predictions from those of the unmerged model, in nats, and the loss is in nats a token.

"""


def merged_card(
    content: Mapping[str, Any], certificate: Certificate | None, bits: float, stored: Mapping[str, Any]
) -> str:
    """Return the text of the `README.md` of a merged model.

    Args:
        content: content of its `merge.json`.
        certificate: how far it is from the unmerged model.
        bits: its bits per weight.
        stored: its `quantization_config`; empty if it is written in floating point.
    """
    served = stored.get("sym") and stored.get("bits") in {4, 8}
    loading = _LOADING.get(str(stored.get("quant_method")), "")
    front_matter = {"base_model": content["model"], "library_name": "transformers", "tags": ["quailora"]}
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True, width=10**6),
        model=" ".join(str(content["model"]).split()),
        adapter=content["adapter"],
        format=content["format"],
        training=content["training"],
        bits=bits,
        loading=loading.format(vllm=_SYMMETRIC if served else _ASYMMETRIC),
        certificate=_UNMEASURED if certificate is None else _MEANING + certificate.as_markdown(),
    )
