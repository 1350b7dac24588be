"""Walk through a model block by block: one block's weights, inputs and statistics at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.paired import PairedStatistics
from ..core.statistics import InputStatistics
from ..errors import CalibrationError, ModelError, NumericalError
from ..models.layers import Layer
from ..models.weights import execution_device, is_offloaded, replaced, resident
from ..support import distributed
from ..support.choices import InputsOf as InputsOf  # noqa: PLC0414 # imported from here, too
from .activations import Activations
from .blocks import Call, Chain, WholeModel, explained, find_chain
from .capture import Inputs, arithmetic, captured, shared_inputs
from .collector import BlockTally
from .windows import CalibrationDtype

Forward = Callable[[int, Tensor], Tensor]
"""Runs one block on the hidden states of a batch, given by its number."""

Run = Callable[..., Inputs]
"""Runs one block on a batch in one network, and returns what layers were run on; see `Walk._visit`."""

TOKENS_PER_PASS = 4096
"""Tokens of a batch, but for windows that are longer."""

_PROBE_TOKENS = 8
_HELD_OUT_EVERY = 4  # of the windows, where some are held out


@final
@dataclass(frozen=True, eq=False)
class Block:
    """One block of a model, or the layers in it that share an input, resident while the walk waits at it.

    Attributes:
        index: its place in the model; what lies outside all blocks comes last.
        layers: the layers in it, by name.
        statistics: the inputs of each layer; layers with the same input share one object. Taking entries out of it
            frees them.
        tokens: calibration tokens that each layer saw.
        paired: for asymmetric inputs, those of both networks, but for experts; `statistics` are then a part of them.
        held_out: the same from the batches that are held out, which are counted in `paired`, too.
        replacements: what the layers will compute with in the quantized network; to be filled in by whoever walks.
    """

    index: int
    layers: Mapping[str, Layer]
    statistics: dict[str, InputStatistics]
    tokens: Mapping[str, int]
    paired: dict[str, PairedStatistics] = field(default_factory=dict)
    held_out: dict[str, PairedStatistics] = field(default_factory=dict)
    replacements: dict[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Walk:
    """Runs a model block by block on calibration windows.

    Each block is brought into memory, run on what the block before it returned, and dropped. Layers in it get the
    statistics of their inputs; with several processes each runs its share of the windows, and statistics are summed.

    Attributes:
        model: a transformers causal language model, in memory or on disk.
        layers: the layers to watch, by name.
        windows: token ids.
        inputs: "full": of the full-precision model. "quantized": of the network in which all layers before are
            replaced by `Block.replacements`; blocks then come in groups of layers with the same input, and are run
            once more for each. "asymmetric": of both, paired.
        dtype: arithmetic; see `Calibration`.
        activations: keeps hidden states between blocks.
        start: blocks that an earlier walk has done.
        on_done: called with the number of blocks done, when all that the next block needs is kept.
        on_batch: called with a few words before a block is run on a batch.
    """

    model: Any
    layers: Mapping[str, Layer]
    windows: Int[Tensor, "samples sequence_length"]
    inputs: InputsOf = "full"
    dtype: CalibrationDtype = "auto"
    activations: Activations = field(default_factory=Activations)
    start: int = 0
    on_done: Callable[[int], None] | None = None
    on_batch: Callable[[str], object] = str

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks that have layers, in order.

        Raises:
            CalibrationError: if a layer is never run, or there are too few windows to hold some out.
            NumericalError: if a weight or an input is NaN or infinite.
            ModelError: if the model has to be run block by block and cannot be.
        """
        if any(layer.expert is not None for layer in self.layers.values()):
            self.model.set_experts_implementation("eager")  # a product for each expert, which can be watched
        chain = self._chain()
        batches, held_out = self._batches()
        calls = {}
        for index, ids in batches.items():
            with arithmetic(self.model, self.dtype), explained(self.model):
                hidden, calls[index] = chain.record(ids)
            for network in self._networks if self.start == 0 else ():
                self.activations.save(0, network, index, hidden)
        members = [self._members(name) for name in chain.names]
        outside = [name for name in self.layers if not any(name in inside for inside in members)]
        last = len(members) if outside else max((i + 1 for i, inside in enumerate(members) if inside), default=0)
        for index in range(self.start, last):
            with resident(chain.blocks[index]):
                check_finite_parameters(chain.names[index], chain.blocks[index])
                forward = partial(_run_block, chain, calls, index)
                yield from self._visit(index, members[index], forward, batches, held_out)
            distributed.barrier()
            if self.on_done is not None:
                self.on_done(index + 1)
            distributed.barrier()
            self.activations.drop(index)
        if outside:
            rest = {name: self.layers[name] for name in outside}
            with ExitStack() as weights:
                for layer in rest.values():
                    weights.enter_context(resident(layer.module))
                forward = partial(_run_outside, chain, batches)
                yield from self._visit(last, rest, forward, batches, held_out)

    @property
    def _networks(self) -> tuple[str, ...]:
        return ("full", "quantized") if self.inputs == "asymmetric" else (self.inputs,)

    def _chain(self) -> Chain | WholeModel:
        try:
            return find_chain(self.model, self.windows[:1, :_PROBE_TOKENS])
        except ModelError as error:
            if self.inputs == "full" and not is_offloaded(self.model):
                return WholeModel(self.model)
            raise ModelError(f"{error} It can be calibrated in memory only, on full-precision inputs.") from error

    def _batches(self) -> tuple[dict[int, Tensor], set[int]]:
        """Return this process's batches by number, and which of all batches are held out."""
        samples, length = self.windows.shape
        held = torch.arange(samples) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        if self.inputs != "asymmetric":
            held = torch.zeros_like(held)
        elif samples < _HELD_OUT_EVERY:
            raise CalibrationError(
                f"Expected at least {_HELD_OUT_EVERY} calibration samples for asymmetric inputs, of which every "
                f"{_HELD_OUT_EVERY}th is held out, got {samples}."
            )
        batches: list[Tensor] = []
        counts = []
        for part in (self.windows[~held], self.windows[held]):
            size = max(1, min(TOKENS_PER_PASS // length, math.ceil(len(part) / distributed.world_size())))
            batches += torch.split(part, size) if len(part) else ()
            counts.append(len(batches))
        mine = range(distributed.rank(), len(batches), distributed.world_size())
        return {index: batches[index] for index in mine}, set(range(*counts))

    def _members(self, block: str) -> dict[str, Layer]:
        return {name: layer for name, layer in self.layers.items() if not block or name.startswith(f"{block}.")}

    def _visit(
        self, index: int, layers: Mapping[str, Layer], forward: Forward, batches: Iterable[int], held_out: set[int]
    ) -> Iterator[Block]:
        device = execution_device(self.model)

        def run(batch: int, network: str, watched: Mapping[str, Layer], *, keep: bool, cut: bool = False) -> Inputs:
            self.on_batch(f"Block {index}: batch {batch + 1}")
            hidden = self.activations.load(index, network, batch, device)
            with (
                explained(self.model),
                captured(watched, cut=cut and not keep) as inputs,
                arithmetic(self.model, self.dtype),
            ):
                hidden = forward(batch, hidden)
            if keep:
                self.activations.save(index + 1, network, batch, hidden)
            return inputs

        groups, cut = self._in_order(layers, batches, run)
        replacements: dict[str, Tensor] = {}
        for members in groups:
            tally = BlockTally(members, device, paired=self.inputs == "asymmetric")
            for batch in batches:
                full: Inputs = {}
                inputs: Inputs = {}
                if self.inputs != "quantized":
                    full = run(batch, "full", members, keep=members is groups[0], cut=cut)
                if self.inputs != "full":
                    with replaced(layers, replacements):
                        inputs = run(batch, "quantized", members, keep=False, cut=cut)
                tally.add(full if self.inputs == "full" else inputs, full, held_out=batch in held_out)
                del full, inputs  # they would stay while the block is worked on
            if members:
                yield Block(index, members, *tally.result(), replacements)
        if self.inputs != "full":
            with replaced(layers, replacements):
                for batch in batches:
                    run(batch, "quantized", {}, keep=True)

    def _in_order(
        self, layers: Mapping[str, Layer], batches: Iterable[int], run: Run
    ) -> tuple[list[Mapping[str, Layer]], bool]:
        """Return the layers in groups with the same input, or of the same fused parameter, in the order they run in.

        All are one group for inputs in full precision. The second result says whether each layer is run just once, so
        that what comes after a group need not be run for its inputs.

        One layer after the other, each sees what those before it in the block have become. Fitted all at once to the
        block as it was, each would make up for the same errors of earlier blocks, and together they would overshoot.
        """
        if self.inputs == "full" or not layers:
            return [layers], False
        found: list[tuple[str, ...]] = []
        once = True
        for batch in list(batches)[:1]:
            inputs = run(batch, "quantized", layers, keep=False)
            found, once = shared_inputs(inputs), all(len(tensors) == 1 for tensors in inputs.values())
        order = next(filter(None, distributed.gather(found)), [])
        groups: dict[str, dict[str, Layer]] = {}
        for name in [*(name for names in order for name in names), *layers]:
            leader = next((names[0] for names in order if name in names), name)
            groups.setdefault(layers[leader].group, {})[name] = layers[name]
        return list(groups.values()), once and all(layer.expert is None for layer in layers.values())


def _run_block(
    chain: Chain | WholeModel, calls: Mapping[int, list[Call]], index: int, batch: int, hidden: Tensor
) -> Tensor:
    return chain.run(index, calls[batch][index], hidden)


def _run_outside(chain: Chain | WholeModel, batches: Mapping[int, Tensor], batch: int, hidden: Tensor) -> Tensor:
    return chain.finish(batches[batch], hidden)


def check_finite_parameters(name: str, block: nn.Module) -> None:
    """Raise a `NumericalError` that names the first weight with NaN or infinite entries."""
    for parameter, value in block.named_parameters():
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericalError(
                f"Expected finite weights, got NaN or infinite entries in {name}.{parameter}. "
                "The checkpoint is damaged, or its dtype overflowed."
            )


def collect_statistics(
    model: Any,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "samples sequence_length"],
    dtype: CalibrationDtype = "auto",
) -> dict[str, InputStatistics]:
    """Return the statistics of all layers at once, from one walk through the full-precision model.

    See `Walk` for arguments and errors; it holds one block's statistics at a time.
    """
    collected: dict[str, InputStatistics] = {}
    for block in Walk(model, layers, windows, dtype=dtype):
        collected |= block.statistics
    return {name: collected[name] for name in layers}
