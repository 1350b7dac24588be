"""What PEFT's own start of a family does to SmolLM2 in NF4, where it is not the model without an adapter.

    python benchmarks/family_stock.py wikitext2_raw_test.txt c4_300.jsonl --families c3a fourierft waveft

Sizes are those of docs/families.md, and the windows are those of `quailora compare --windows 8`.
"""

from __future__ import annotations

import argparse

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

from quailora import FAMILIES, NF4, LoraScaling, TextSource
from quailora.adapters.tuned import adapter_of, tensors_of
from quailora.calibration.windows import evaluation_windows
from quailora.comparison.sizes import of_size
from quailora.evaluation.scores import Corrected, measure
from quailora.families import Correction
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.support.tables import markdown_table


@torch.no_grad()
def main() -> None:
    """Print perplexity and KL of each start on each text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--families", nargs="+", default=["c3a", "fourierft", "waveft"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=1024)
    asked = parser.parse_args()
    loaded = load_model("demo", "float32", "cpu")
    layers = {name: layer for name, layer in linear_layers(loaded.model).items() if name != "lm_head"}
    quantized = {name: NF4().quantize(layer.weight).dequantize() for name, layer in layers.items()}
    variants = {"NF4 alone": Corrected(quantized, {})}
    for name in asked.families:
        variants[name] = Corrected(quantized, stock_start(name, layers))
    rows = {name: [name] for name in variants}
    for text in asked.texts:
        documents = TextSource(text).documents(loaded.tokenizer)
        windows = evaluation_windows(loaded.tokenizer, documents, asked.windows, asked.window_length)
        for name, scores in measure(loaded.model, layers, variants, windows).items():
            rows[name] += [f"{scores.perplexity:.2f}", f"{scores.divergence:.4f}"]
    head = ["start", *(f"{what} on {text}" for text in asked.texts for what in ("perplexity", "KL"))]
    print(markdown_table(head, list(rows.values())))


def stock_start(name: str, layers: dict) -> dict[str, Correction]:
    """Return what PEFT puts into a model by default, with seed 0."""
    sized = of_size(FAMILIES[name](), 16, layers, "numbers")
    sizes = LoraScaling(sized.rank).as_config()
    arguments = {key: value for key, value in sized.family.config(sizes).items() if not key.startswith("init_")}
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    config = PEFT_TYPE_TO_CONFIG_MAPPING[sized.family.peft_type](**arguments, target_modules=targets)
    torch.manual_seed(0)
    model = get_peft_model(load_model("demo", "float32", "cpu").model, config)
    adapted, _, family = adapter_of(model, "default")
    return {
        layer: Correction(family, {end: tensor.detach().clone() for end, tensor in tensors_of(one).items()}, one.shape)
        for layer, one in adapted.items()
    }


if __name__ == "__main__":
    main()
