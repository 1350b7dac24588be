"""What a bias does at the first token of a text, to which all others attend: KL with it there, and without it.

python benchmarks/first_token.py wikitext2_valid.txt wikitext2_raw_test.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import fmean

import torch
from torch import Tensor

from quailora import NF4, Calibration, TextSource, initialize_model
from quailora.calibration.windows import evaluation_windows
from quailora.evaluation.scores import log_probabilities, predict, score
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import load_model
from quailora.models.weights import replaced
from quailora.support.tables import markdown_table


@torch.no_grad()
def main() -> None:
    """Print the mean KL over windows, and the share of that of NF4 alone that is cut in the worst and the best one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=3)
    asked = parser.parse_args()
    corrections = initialize_model(
        "demo", "qera-exact", Calibration(TextSource(asked.calibration)), family="beft"
    ).corrections
    biases = {name: correction.parameters["beft_bias"].flatten() for name, correction in corrections.items()}
    loaded = load_model("demo", "float32", "cpu")
    layers = {name: layer for name, layer in linear_layers(loaded.model).items() if name in biases}
    quantized = {name: NF4().quantize(layer.weight).dequantize() for name, layer in layers.items()}
    documents = TextSource(asked.text).documents(loaded.tokenizer)
    found: dict[str, list[float]] = {}
    for ids in evaluation_windows(loaded.tokenizer, documents, asked.windows, 1024):
        reference = log_probabilities(predict(loaded.model, ids, 1))
        with replaced(layers, quantized):
            plain = score(reference, predict(loaded.model, ids, 1), ids[1:])[1]
            for title, first in (("beft", 0), ("beft, not at the first token", 1)):
                with added(layers, biases, first):
                    kl = score(reference, predict(loaded.model, ids, 1), ids[1:])[1]
                found.setdefault(title, []).append(1 - kl / plain)
    rows = [[title, *(f"{share:.0%}" for share in (fmean(cut), min(cut), max(cut)))] for title, cut in found.items()]
    print(markdown_table(["bias", "KL cut, mean over windows", "least", "most"], rows))


@contextmanager
def added(layers: Mapping[str, Layer], biases: Mapping[str, Tensor], first: int) -> Iterator[None]:
    """Add biases to the outputs of layers inside a `with` statement, from the token of a number on."""
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def hook(_: object, __: object, output: Tensor, bias: Tensor = biases[name]) -> Tensor:
                return torch.cat([output[:, :first], output[:, first:] + bias], dim=1)

            hooks.enter_context(layer.module.register_forward_hook(hook))
        yield


if __name__ == "__main__":
    main()
