"""What initialization costs on a whole model, against one plain forward pass over the same tokens.

    python benchmarks/whole_model.py --calibration wikitext2_valid.txt --ranks [16,64]

Prints seconds of the plain pass (with logits, without, and in bfloat16), of the calibration pass, and of everything
after it, which is quantization, all solutions and all errors of the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jsonargparse import auto_cli

from quailora import NF4, Initializer, Optimal
from quailora.adapters.lora import LoraScaling
from quailora.calibration.collector import LayerInputs
from quailora.calibration.text import TextSource
from quailora.calibration.walk import Block, collect_statistics
from quailora.calibration.windows import Calibration
from quailora.methods.method import Method
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.pipeline.layerwise import initialize_layer
from quailora.support.tables import markdown_table


def timed(action: Callable):
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


@torch.no_grad()
def plain_pass(model, windows, *, head: bool = True, bfloat16: bool = False) -> None:
    """Run the model as a user would, one window at a time."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        for window in windows.to(device):
            (model if head else model.base_model)(input_ids=window[None], use_cache=False)


def main(
    calibration: str | None = None,
    model: str = "demo",
    samples: int = 16,
    sequence_length: int = 1024,
    ranks: tuple[int, ...] = (16, 64),
    rounds: int = 1,
) -> None:
    """Print the table.

    Args:
        calibration: text to calibrate on; the shipped text by default.
        model: the model.
        samples: calibration windows.
        sequence_length: tokens in a window.
        ranks: ranks of the adapters.
        rounds: how often everything is measured; the fastest counts.
    """
    loaded = load_model(model)
    layers = linear_layers(loaded.model)
    windows = Calibration(TextSource(calibration), samples, sequence_length).windows(loaded.tokenizer)
    plain_pass(loaded.model, windows[:1])
    seconds: dict[str, float] = {}

    def measure(name: str, action: Callable):
        result, took = timed(action)
        seconds[name] = min(took, seconds.get(name, took))
        return result

    for _ in range(rounds):
        measure("plain forward pass", lambda: plain_pass(loaded.model, windows))
        measure("plain, without the output head", lambda: plain_pass(loaded.model, windows, head=False))
        measure("plain, in bfloat16", lambda: plain_pass(loaded.model, windows, bfloat16=True))
        statistics = measure("calibration pass", lambda: collect_statistics(loaded.model, layers, windows))
        for rank in ranks:
            methods = {"optimal": Method(Initializer(NF4(), Optimal()), LoraScaling(rank))}
            inputs = {name: LayerInputs(layers[name], statistics[name], windows.numel()) for name in layers}
            measure(f"everything after it, rank {rank}", partial(initialize, Block(0, inputs), methods))
    plain = seconds["plain forward pass"]
    rows = [[name, f"{took:.1f}", f"{took / plain:.2f}"] for name, took in seconds.items()]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {loaded.model.dtype}\n")
    print(markdown_table(("phase", "seconds", "of the plain pass"), rows))


def initialize(block: Block, methods: Mapping[str, Method]) -> None:
    """Initialize all layers of a block; nothing is kept."""
    for one in block.drain():
        for _ in initialize_layer(one.layer, one.statistics, methods, seed=0):
            pass


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
