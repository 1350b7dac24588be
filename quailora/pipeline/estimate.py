"""What a run will take, from configuration and shapes alone: adapter size, bits, memory, time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from ..calibration.capture import has_bfloat16
from ..calibration.sources import CalibrationSource
from ..calibration.tokens import TOKENS_PER_PASS
from ..calibration.walk import InputsOf
from ..methods.block_training import TRAINED_BYTES
from ..methods.method import Method
from ..models.layers import Layer, block_of, kind, largest_block
from ..quantizers import Quantizer
from ..support.machine import duration, flops, size
from ..support.tables import print_table
from .formats import bits_of_layers
from .targets import AdapterPlan, layers_of_run, with_kept

_FIXED = {"cpu": 450 * 2**20, "cuda": 256 * 2**20}  # Python with torch and transformers; libraries of a GPU
_MEMORY = {"cpu": "memory", "cuda": "GPU memory"}


@final
@dataclass(frozen=True)
class Estimate:
    """What a run will take; memory and time are rough.

    Attributes:
        model: the model as the caller named it.
        rows: kind of layer, how many, shape, rank, adapter parameters of all of them.
        adapter_bytes: size of the adapter's file.
        bits_per_weight: stored bits of the quantized layers, and of those that a plan keeps in 16 bits, together.
        model_bytes: all weights in their dtype.
        device: kind of device that computes; the three numbers that follow are of its memory.
        in_memory: peak bytes with the model in memory.
        streamed: peak bytes with the model left on disk.
        available: bytes that may be used.
        disk: bytes that the state of the unfinished run takes beside the output.
        seconds: time that calibration and initialization take on this device.
    """

    model: str
    rows: list[tuple[str, int, tuple[int, int], int, int]]
    adapter_bytes: int
    bits_per_weight: float
    model_bytes: int
    device: str
    in_memory: int
    streamed: int
    available: int
    disk: int
    seconds: float

    @property
    def verdict(self) -> str:
        """Where the model would go, in words."""
        if self.in_memory <= self.available:
            return f"fits in {self.memory}"
        if self.streamed <= self.available:
            return "fits block by block, with the weights left on disk"
        return f"does not fit: use fewer or shorter samples, fewer targets, or a machine with more {self.memory}"

    @property
    def memory(self) -> str:
        """The memory of the device, in words."""
        return _MEMORY[self.device]

    def show(self) -> None:
        """Print two tables."""
        rows = [
            [name, str(count), f"{shape[0]} x {shape[1]}", str(rank), f"{parameters:,}"]
            for name, count, shape, rank, parameters in self.rows
        ]
        print_table(f"{self.model}: layers", ("layer", "count", "out x in", "rank", "adapter parameters"), rows)
        facts = [
            ["adapter", size(self.adapter_bytes)],
            ["model as it is", size(self.model_bytes)],
            ["quantized layers", f"{self.bits_per_weight:.2f} bits per weight"],
            [f"peak {self.memory}, model in memory", f"about {size(self.in_memory)}"],
            [f"peak {self.memory}, model on disk", f"about {size(self.streamed)}"],
            [f"{self.memory} that may be used", size(self.available)],
            ["state of the run on disk", size(self.disk)],
            ["time on this machine", f"about {duration(self.seconds)}"],
            ["verdict", self.verdict],
        ]
        print_table("What the run takes (memory and time are rough)", ("what", "how much"), facts, "left")


def estimate(
    name: str,
    model: Any,
    adapter: AdapterPlan,
    method: Method,
    source: CalibrationSource,
    *,
    save_base: bool,
    device: str,
    available: int,
    number_bytes: int = 4,
) -> Estimate:
    """Return what initializing an adapter takes.

    Args:
        name: the model as the caller named it.
        model: the model without weights.
        adapter: the layers that get a correction, and which layers are run on the same tensors.
        method: quantizer and ranks.
        source: how much there is to calibrate on.
        save_base: whether the base is written, too, so that layers without a correction are quantized.
        device: kind of device that computes.
        available: bytes of its memory that may be used.
        number_bytes: bytes of a number of the adapter in its file.
    """
    layers, reach, scaling = adapter.layers, adapter.reach, method.scaling
    made = reach.watched(layers_of_run(model, layers, method, save_base=save_base))
    groups: dict[tuple[str, tuple[int, int], int, Quantizer | None], list[Layer]] = {}
    for layer in layers.values():
        quantizer = method.initializer_of(layer).quantizer
        groups.setdefault((kind(layer.name), layer.shape, scaling.rank_of(layer.group), quantizer), []).append(layer)
    rows = [
        (what, len(same), shape, rank, len(same) * method.family.numbers(shape, rank))
        for (what, shape, rank, _), same in groups.items()
    ]
    shared = method.family.shared_numbers({name: layer.shape for name, layer in layers.items()}, scaling.rank)
    adapter_bytes = number_bytes * shared + sum(
        len(same) * method.family.layer_bytes(shape, rank, number_bytes) for (_, shape, rank, _), same in groups.items()
    )
    samples, length = source.size
    tokens = samples * length
    per_pass = max(length, min(tokens, TOKENS_PER_PASS))
    paired = method.inputs == "asymmetric"
    width = 2 if paired else 1
    inputs = reach.distinct(made)
    by_block: dict[str, list[int]] = {}
    for layer in inputs.values():
        by_block.setdefault(block_of(layer.name), []).append(layer.shape[1])
    # What is in memory at the same time: second moments, inputs that were captured in one pass, the working copies of
    # one layer, and the weights of the model or of one block.
    at_once = inputs_at_once(inputs, method.inputs)
    element = model.dtype.itemsize
    grams = max(sum(gram_bytes(layer, paired=paired) for layer in group) for group in at_once)
    captured_bytes = max(per_pass * sum(widths) * element * width for widths in by_block.values())
    fixed = _FIXED[device] + captured_bytes + solving_bytes(made, method, grams)
    total = sum(parameter_bytes(model).values())
    hidden = tokens * largest_hidden(model) * element * width
    return Estimate(
        model=name,
        rows=rows,
        adapter_bytes=adapter_bytes,
        bits_per_weight=bits_of_layers(with_kept(model, made, method.kept), method),
        model_bytes=total,
        device=device,
        in_memory=fixed + total,
        streamed=fixed + largest_block(parameter_bytes(model)),
        available=available,
        disk=4 * sum(row[-1] for row in rows) + 2 * hidden,
        seconds=seconds_for(
            made,
            inputs,
            method,
            corrected=layers,
            tokens=tokens,
            shares={name: share_of_tokens(model, layer) for name, layer in made.items()},
            width=width,
            runs=1 if method.inputs == "full" else width * max(map(len, by_block.values())) + 1,
            device=device,
            low=element == 2 or (device == "cpu" and has_bfloat16()),
        ),
    )


def solving_bytes(layers: Mapping[str, Layer], method: Method, grams: int) -> int:
    """Return the bytes that fitting a layer takes, or training a block, which comes when the moments are gone.

    Args:
        layers: the layers that are quantized.
        method: how they are fitted.
        grams: bytes of the moments of inputs that are held at the same time.
    """
    # Cholesky factors or a float32 Gram of the widest input; error, weight and quantized weight of the largest layer in
    # float64 and float32.
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in layers.items()}
    widest = max(layer.shape[1] for layer in layers.values())
    working = (16 if method.inputs == "asymmetric" else 4) * widest**2 + 24 * max(sizes.values())
    trained = TRAINED_BYTES * largest_block(sizes) if method.blocks is not None else 0
    return max(grams + working, trained)


def inputs_at_once(inputs: Mapping[str, Layer], inputs_of: InputsOf) -> list[list[Layer]]:
    """Return the inputs whose statistics are held at the same time.

    They are those of a block; where each layer sees what those before it have become, they are one input or the experts
    of one parameter.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in inputs.values():
        groups.setdefault(block_of(layer.name) if inputs_of == "full" else layer.group, []).append(layer)
    return list(groups.values())


def gram_bytes(layer: Layer, *, paired: bool) -> int:
    """Return the bytes of the moments of a layer's inputs, and of what a fit to two networks adds to them.

    Paired are two moments of all tokens, two of those that are held out, and one that is factored; experts have one.
    """
    return 8 * (5 if paired and layer.expert is None else 1) * layer.shape[1] ** 2


def parameter_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of each parameter of a model, by name."""
    return {name: parameter.numel() * parameter.element_size() for name, parameter in model.named_parameters()}


def largest_hidden(model: Any) -> int:
    """Return the width of the hidden states between blocks."""
    embeddings: nn.Embedding = model.get_input_embeddings()
    return embeddings.embedding_dim


def share_of_tokens(model: Any, layer: Layer) -> float:
    """Return the share of all tokens that a layer sees: an expert only those that are sent to it."""
    if layer.expert is None:
        return 1.0
    experts = len(getattr(layer.module, layer.parameter))
    return getattr(model.config, "num_experts_per_tok", experts) / experts


def seconds_for(
    layers: Mapping[str, Layer],
    inputs: Mapping[str, Layer],
    method: Method,
    *,
    corrected: Collection[str],
    tokens: int,
    shares: Mapping[str, float],
    width: int,
    runs: int,
    device: str,
    low: bool,
) -> float:
    """Return roughly how long calibration and initialization take here, from a short test of the device.

    Counted are the model's own products, backward passes among them, those of the statistics, and a solution's: two
    dense products for errors and some twenty thin ones for each rank.
    """
    single, fast = flops(torch.float32, device), flops(torch.bfloat16 if low else torch.float32, device)
    # A product of (tokens, in) and (in, out) takes 2 tokens in out operations. A backward pass takes twice a forward
    # pass: one product for the gradient of the input, one for that of the weight.
    seen = {name: tokens * share for name, share in shares.items()}
    forward = sum(2 * seen[name] * layer.shape[0] * layer.shape[1] for name, layer in layers.items()) * runs
    passes = 3.0 * tokens if method.initializer.weighting.needs_gradients else 0.0
    if method.distillation is not None:  # forward in full precision; forward and backward in the quantized network
        passes += 4.0 * method.distillation.steps * method.distillation.tokens
    if method.blocks is not None:  # forward and backward
        passes += 3.0 * method.blocks.steps * method.blocks.tokens
    forward += sum(2 * passes * layer.shape[0] * layer.shape[1] for layer in layers.values())
    each = 2 * 5 / 8 + (2 if width == 2 else 0)  # a symmetric product; of two networks another, which is not
    grams = sum(each * seen[name] * layer.shape[1] ** 2 for name, layer in inputs.items())
    solutions = 0.0
    for layer in layers.values():
        rows, columns = layer.shape
        rank = method.rank_of(layer.group) if layer.name in corrected else 0
        thin = 20.0 * rank * (2 * rows * columns + columns**2)
        solutions += (2 * 2.0 * rows * columns**2 + thin) * method.initializer.schedule.solutions
    return forward / fast + (grams + solutions) / single
