"""Walk through a model block by block: one block's weights, inputs and statistics at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.statistics import InputStatistics
from ..errors import ModelError
from ..models.layers import Layer, block_of
from ..models.weights import execution_device, is_offloaded, replaced, resident
from ..support import distributed
from ..support.choices import InputsOf as InputsOf  # noqa: PLC0414 # imported from here, too
from .activations import Activations
from .blocks import Call, Chain, WholeModel, explained, find_chain
from .capture import Inputs, arithmetic, captured, shared_inputs
from .collector import BlockCollector
from .examples import BlockExamples
from .gradients import frozen
from .tokens import TOKENS_PER_PASS, CalibrationTokens, TokenBatch
from .visit import Block as Block  # noqa: PLC0414 # imported from here, too
from .visit import Visit, check_finite_parameters
from .windows import CalibrationDtype

Train = Callable[[BlockExamples, Sequence[str]], Mapping[str, Tensor]]
"""Trains a block, given the names of its layers; returns what they compute with from then on, as a visit does."""

Forward = Callable[[int, Tensor], Tensor]
"""Runs one block on the hidden states of a batch, given by its number."""

RunBlock = Callable[..., Inputs]
"""Runs one block on a batch in one network, and returns what layers were run on; the inner `run` of `Walk._run_at`."""


@final
@dataclass(frozen=True, eq=False)
class Walk:
    """Runs a model block by block on calibration tokens.

    Each block is brought into memory, run on what the block before it returned, and dropped. Layers in it get the
    statistics of their inputs; with several processes each runs its share of the tokens, and statistics are summed.

    Attributes:
        model: a transformers causal language model, in memory or on disk.
        layers: the layers to watch, by name.
        tokens: the tokens that the model is run on.
        inputs: which network's inputs layers get statistics of. "full": the full-precision model. "quantized": the
            network in which all layers before have the weights that visits have returned; the layers of a block then
            come in groups with the same input, and the block is run once more for each group. "asymmetric": both
            networks, paired by token.
        dtype: arithmetic; see `Calibration`.
        activations: keeps hidden states between blocks.
        start: number of blocks that an earlier walk has done, whose results `activations` must hold.
        on_done: called with the number of blocks done, when all that the next block needs is kept.
        on_batch: called with a few words before a block is run on a batch.
        batch_tokens: tokens that the model is run on at once, but for sequences that are longer.
    """

    model: Any
    layers: Mapping[str, Layer]
    tokens: CalibrationTokens
    inputs: InputsOf = "full"
    dtype: CalibrationDtype = "auto"
    activations: Activations = field(default_factory=Activations)
    start: int = 0
    on_done: Callable[[int], None] | None = None
    on_batch: Callable[[str], object] = str
    batch_tokens: int = TOKENS_PER_PASS

    @torch.no_grad()
    def run(self, visit: Visit, train: Train | None = None) -> Sequence[str]:
        """Visit the blocks that have layers, in order; return the module names of all blocks.

        Args:
            visit: called with each block while its weights are resident.
            train: called with each block after its visits; inputs have to be "asymmetric".

        Raises:
            CalibrationError: if a layer is never run, or there are too few sequences to hold some out.
            NumericalError: if a weight or an input is NaN or infinite.
            ModelError: if the model has to be run block by block and cannot be.
            ValueError: if `inputs` is not "full", and a visit returns no weight for one of its layers.
        """
        if any(layer.expert is not None for layer in self.layers.values()):
            self.model.set_experts_implementation("eager")  # a product for each expert, which can be watched
        chain = self._chain()
        batches, held_out = self._batches()
        calls = {}
        for number, batch in batches.items():
            with arithmetic(self.model, self.dtype), explained(self.model):
                hidden, calls[number] = chain.record(batch.ids)
            for network in self._networks if self.start == 0 else ():
                self.activations.save(0, network, number, hidden)
        members = [self._members(name) for name in chain.names]
        outside = [name for name in self.layers if not any(name in inside for inside in members)]
        end = len(members) if outside else max((i + 1 for i, inside in enumerate(members) if inside), default=0)
        for index in range(self.start, end):
            with resident(chain.blocks[index]):
                check_finite_parameters(chain.names[index], chain.blocks[index])
                forward = partial(_run_block, chain, calls, index)
                self._run_at(index, members[index], forward, batches, held_out, visit, train)
            # All hidden states behind this block are there before it counts as done, and it counts as done before those
            # in front of it go: a run that is killed in between finds one set or the other.
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
                self._run_at(end, rest, forward, batches, held_out, visit)
        return chain.names

    @property
    def _networks(self) -> tuple[str, ...]:
        return ("full", "quantized") if self.inputs == "asymmetric" else (self.inputs,)

    def _chain(self) -> Chain | WholeModel:
        try:
            return find_chain(self.model, self.tokens.probe())
        except ModelError as error:
            if self.inputs == "full" and not is_offloaded(self.model):
                return WholeModel(self.model)
            raise ModelError(f"{error} It can be calibrated in memory only, on full-precision inputs.") from error

    def _batches(self) -> tuple[dict[int, TokenBatch], set[int]]:
        """Return this process's batches by number, and which of all batches are held out."""
        first, step, hold_out = distributed.rank(), distributed.world_size(), self.inputs == "asymmetric"
        batches, held_from = self.tokens.batches(step, hold_out=hold_out, most=self.batch_tokens)
        # Each process gets some of both kinds, where there are enough.
        mine = (*range(first, held_from, step), *range(held_from + first, len(batches), step))
        return {number: batches[number] for number in mine}, set(range(held_from, len(batches)))

    def _members(self, block: str) -> dict[str, Layer]:
        return {name: layer for name, layer in self.layers.items() if not block or name.startswith(f"{block}.")}

    def _run_at(
        self,
        index: int,
        layers: Mapping[str, Layer],
        forward: Forward,
        batches: Mapping[int, TokenBatch],
        held_out: set[int],
        visit: Visit,
        train: Train | None = None,
    ) -> None:
        """Run a block on all batches, visit it, and keep what it returns for the next one."""
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
            collector = BlockCollector(members, device, paired=self.inputs == "asymmetric")
            for batch, tokens in batches.items():
                full: Inputs = {}
                inputs: Inputs = {}
                if self.inputs != "quantized":
                    full = run(batch, "full", members, keep=members is groups[0], cut=cut)
                if self.inputs != "full":
                    with replaced(layers, replacements):
                        inputs = run(batch, "quantized", members, keep=False, cut=cut)
                collected = full if self.inputs == "full" else inputs
                collector.add(collected, full, tokens.counted, held_out=batch in held_out)
                del full, inputs, collected  # they would stay while the block is worked on
            if members:
                replacements |= self._visited(Block(index, collector.result()), visit)
        replacements |= self._trained(train, index, tuple(replacements), forward, batches, held_out)
        if self.inputs != "full":
            with replaced(layers, replacements):
                for batch in batches:
                    run(batch, "quantized", {}, keep=True)

    def _trained(
        self,
        train: Train | None,
        index: int,
        names: Sequence[str],
        forward: Forward,
        batches: Mapping[int, TokenBatch],
        held_out: set[int],
    ) -> Mapping[str, Tensor]:
        """Train a block whose visits are over, and return what its layers compute with from now on, if that changes."""
        if train is None or not names:
            return {}
        # The hidden states of both networks are still there: those in front of the block, and those that full precision
        # has behind it.
        device = execution_device(self.model)

        def output(batch: int) -> Tensor:
            hidden = self.activations.load(index, "quantized", batch, device)
            with explained(self.model), arithmetic(self.model, self.dtype):
                return forward(batch, hidden)

        examples = BlockExamples(
            index,
            block_of(names[0]),
            [batch for batch in batches if batch not in held_out],
            [batch for batch in batches if batch in held_out],
            output,
            lambda batch: self.activations.load(index + 1, "full", batch, device),
            lambda batch: batches[batch].counted,
            shared=True,
        )
        # The parameters of the model itself would collect gradients, which nobody reads.
        with frozen(self.model):
            return train(examples, names)

    def _visited(self, block: Block, visit: Visit) -> Mapping[str, Tensor]:
        """Visit a block, and return what its layers compute with from now on."""
        weights = visit(block)
        missing = [] if self.inputs == "full" else [name for name in block.layers if name not in weights]
        if missing:
            raise ValueError(f"Expected a weight for each layer of the block, got none for {missing[0]}.")
        return weights

    def _in_order(
        self, layers: Mapping[str, Layer], batches: Iterable[int], run: RunBlock
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


def _run_outside(chain: Chain | WholeModel, batches: Mapping[int, TokenBatch], batch: int, hidden: Tensor) -> Tensor:
    return chain.finish(batches[batch].ids, hidden)


def collect_statistics(
    model: Any,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "samples sequence_length"],
    dtype: CalibrationDtype = "auto",
) -> dict[str, InputStatistics]:
    """Return the statistics of all layers at once, from one walk through the full-precision model.

    Args:
        model: a transformers causal language model.
        layers: the layers to watch.
        windows: token ids of the windows.
        dtype: arithmetic; see `Calibration`.

    See `Walk.run` for errors.
    """
    collected: dict[str, InputStatistics] = {}

    def collect(block: Block) -> Mapping[str, Tensor]:
        collected.update({one.layer.name: one.statistics for one in block.drain()})
        return {}

    Walk(model, layers, CalibrationTokens.of_windows(windows), dtype=dtype).run(collect)
    return {name: collected[name] for name in layers}
