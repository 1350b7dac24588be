"""What it costs to keep the factors of LoRA in bfloat16, layer by layer, at the same bytes and at half of them.

    python benchmarks/factors_dtype.py TEXT OTHER_TEXT

Factors of twice the rank in bfloat16 take as many bytes as factors in float32. Layers that receive massive inputs come
last: there a correction cancels to many digits, and rounding its factors leaves what it would cancel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from quailora import NF4, Calibration, Optimal, TextSource
from quailora.calibration.walk import collect_statistics
from quailora.core.metrics import gram
from quailora.core.objective import Objective
from quailora.families.lora import divided_factors, parameters_of
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.schedules.layer import QuantizedLayer
from quailora.support.tables import markdown_table

KINDS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "float32": (1, lambda factor: factor),
    "bfloat16": (1, lambda factor: factor.bfloat16().float()),
    "twice the rank, float32": (2, lambda factor: factor),
    "twice the rank, bfloat16": (2, lambda factor: factor.bfloat16().float()),
}


@torch.no_grad()
def main() -> None:
    """Print what each kind of factors closes, over all layers and in the five layers where rounding costs most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("other")
    parser.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    loaded = load_model("demo", "float32", "auto")
    layers = {name: layer for name, layer in linear_layers(loaded.model).items() if name != "lm_head"}
    seen, other = (
        collect_statistics(
            loaded.model, layers, Calibration(TextSource(text), samples, 1024, 0).windows(loaded.tokenizer)
        )
        for text, samples in ((asked.text, 16), (asked.other, 4))
    )
    closed: dict[str, dict[str, tuple[float, float]]] = {kind: {} for kind in KINDS}
    for name, layer in layers.items():
        objective = QuantizedLayer.of(NF4(), layer.weight, seen[name]).objective
        elsewhere = Objective(objective.error, gram(other[name]))
        for kind, (times, rounded) in KINDS.items():
            found = divided_factors(parameters_of(Optimal().minimise(objective, times * asked.rank)), 1.0)
            factors = rounded(found["lora_B.weight"]), rounded(found["lora_A.weight"])
            shares = [1 - one.value(*factors) / one.value_at_zero for one in (objective, elsewhere)]
            closed[kind][name] = shares[0], shares[1]
    exact, rough = closed["twice the rank, float32"], closed["twice the rank, bfloat16"]
    worst = sorted(layers, key=lambda name: exact[name][0] - rough[name][0])[-5:]
    head = ["factors", "closed", "on other text", *(name.removeprefix("model.layers.") for name in worst)]
    rows = [
        [kind, *(f"{fmean(each[part] for each in shares.values()):.2%}" for part in (0, 1))]
        + [f"{shares[name][0]:.2%}" for name in worst]
        for kind, shares in closed.items()
    ]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
