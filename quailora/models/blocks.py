"""A decoder as a chain of blocks: the calls that the model makes of them, without running them.

A model is run with its blocks stubbed. That gives the first block's input and the other arguments of every block
(masks, positions), from the model's own code, so no family needs code here. What makes a model a chain is checked on
the way: each block is called once, in order, gets what the block before it returned, and gets nothing else that
depends on earlier blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import ModelError
from .weights import execution_device, resident

Slot = int | str
"""Where hidden states stand among the arguments: a position or a keyword."""


@final
@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one block for one batch."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def hidden(self, slot: Slot) -> Tensor:
        """Return the hidden states."""
        found: Tensor = self.arguments[slot] if isinstance(slot, int) else self.named[slot]
        return found

    def with_hidden(self, slot: Slot, hidden: Tensor | None) -> Call:
        """Return the same call on other hidden states."""
        if isinstance(slot, int):
            return Call((*self.arguments[:slot], hidden, *self.arguments[slot + 1 :]), self.named)
        return Call(self.arguments, {**self.named, slot: hidden})

    def slot_of(self, hidden: Tensor) -> Slot | None:
        """Return where a tensor object stands."""
        slots: list[tuple[Slot, Any]] = [*enumerate(self.arguments), *self.named.items()]
        return next((slot for slot, value in slots if value is hidden), None)


@final
@dataclass(frozen=True, eq=False)
class Chain:
    """The blocks of a model.

    Attributes:
        model: a transformers causal language model.
        names: module name of each block.
        blocks: the blocks, in the order of the model.
        slot: where a block expects hidden states.
        in_tuple: whether a block returns hidden states as the first of a tuple.
    """

    model: Any
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    slot: Slot
    in_tuple: bool
    _kept: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def run(self, index: int, call: Call, hidden: Tensor) -> Tensor:
        """Run one block, which has to be resident, on hidden states; return the next ones."""
        call = call.with_hidden(self.slot, hidden)
        output = self.blocks[index](*call.arguments, **call.named)
        result: Tensor = output[0] if self.in_tuple else output
        return result

    def record(self, ids: Int[Tensor, "samples length"]) -> tuple[Tensor, list[Call]]:
        """Return the first block's input for a batch, and every block's call without hidden states.

        Tensors that are equal from block to block or from batch to batch are kept once.
        """
        calls = self.stubbed_run(ids, lambda hidden: hidden)
        first = calls[0].hidden(self.slot)
        return first, [self._shared(call.with_hidden(self.slot, None)) for call in calls]

    def finish(self, ids: Int[Tensor, "samples length"], hidden: Tensor) -> Tensor:
        """Run what lies outside the blocks, with the last block's output given; return that."""
        self.stubbed_run(ids, lambda _: hidden)
        return hidden

    def stubbed_run(self, ids: Tensor, reply: Callable[[Tensor], Tensor]) -> list[Call]:
        """Run the model with `reply` of the incoming hidden states in place of each block; return all calls."""
        calls: list[Call] = []

        def stub(*arguments: Any, **named: Any) -> Any:
            calls.append(Call(arguments, named))
            answer = reply(calls[-1].hidden(self.slot))
            return (answer,) if self.in_tuple else answer

        with forward_replaced(self.blocks, [stub] * len(self.blocks)):
            run_body(self.model, ids)
        return calls

    def _shared(self, call: Call) -> Call:
        return Call(map_tensors(self._keep, call.arguments), map_tensors(self._keep, call.named))

    def _keep(self, tensor: Tensor) -> Tensor:
        for kept in self._kept:
            if kept.shape == tensor.shape and kept.dtype == tensor.dtype and torch.equal(kept, tensor):
                return kept
        self._kept.append(tensor)
        return tensor


@final
@dataclass(frozen=True, eq=False)
class WholeModel:
    """A model that is no chain of blocks, as the one block of a chain: its hidden states are the token ids."""

    model: Any
    names: tuple[str, ...] = ("",)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The model."""
        return (self.model,)

    def run(self, index: int, call: Call, hidden: Tensor) -> Tensor:
        """Run the model on token ids; return them."""
        del index, call
        run_body(self.model, hidden)
        return hidden

    def record(self, ids: Int[Tensor, "samples length"]) -> tuple[Tensor, list[Call]]:
        """Return the token ids."""
        return ids, [Call((), {})]

    def finish(self, ids: Int[Tensor, "samples length"], hidden: Tensor) -> Tensor:
        """Nothing lies outside."""
        del ids
        return hidden


@torch.no_grad()
def find_chain(model: Any, probe: Int[Tensor, "1 tokens"]) -> Chain:
    """Return the blocks of a model; its first block is run on a few tokens to see what a block returns.

    Raises:
        ModelError: if the model is no chain of blocks; the message says why.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    outermost = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outermost:
        raise _no_chain(model, "it has no list of modules")
    name = max(outermost, key=lambda name: sum(parameter.numel() for parameter in outermost[name].parameters()))
    blocks = tuple(outermost[name])
    names = tuple(f"{name}.{index}" for index in range(len(blocks)))

    calls: list[tuple[int, Call]] = []
    outputs: list[Any] = []
    originals = [block.forward for block in blocks]

    def stub(index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            calls.append((index, Call(arguments, named)))
            if index == 0 and not outputs:
                outputs.append(originals[0](*arguments, **named))
            elif not outputs:
                raise _no_chain(model, f"{names[index]} runs before {names[0]}")
            else:
                fresh = torch.full_like(_hidden(outputs[0]), index)
                outputs.append((fresh, *outputs[0][1:]) if isinstance(outputs[0], tuple) else fresh)
            return outputs[-1]

        return forward

    with forward_replaced(blocks, [stub(index) for index in range(len(blocks))]), resident(blocks[0]):
        run_body(model, probe)
    if [index for index, _ in calls] != list(range(len(blocks))):
        raise _no_chain(model, f"its {len(blocks)} blocks in {name} are not run once each, in order")
    slots = {call.slot_of(_hidden(output)) for (_, call), output in zip(calls[1:], outputs, strict=False)}
    if len(slots) > 1 or None in slots:
        raise _no_chain(model, f"blocks in {name} do not receive what the block before them returned")
    slot = slots.pop() if slots else (0 if calls[0][1].arguments else "hidden_states")
    chain = Chain(model, names, blocks, slot, isinstance(outputs[0], tuple))  # type: ignore[arg-type] # None is not in slots

    for (_, call), again in zip(calls, chain.stubbed_run(probe, torch.zeros_like), strict=True):
        before, after = (tensors_in(made.with_hidden(chain.slot, None)) for made in (call, again))
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            raise _no_chain(model, f"blocks in {name} receive more than hidden states from earlier blocks")
    return chain


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"Expected a block to return hidden states, got {type(hidden).__name__}.")
    return hidden


def _no_chain(model: Any, why: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be run block by block: {why}.")


def run_body(model: Any, ids: Int[Tensor, "samples length"]) -> None:
    """Run a model without its output head."""
    model.base_model(input_ids=ids.to(execution_device(model)), use_cache=False)


@contextmanager
def forward_replaced(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other functions inside a `with` statement."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, function in zip(modules, functions, strict=True):
            module.forward = function
        yield
    finally:
        for module, earlier in zip(modules, before, strict=True):
            del module.forward
            if earlier is not None:  # a hook of accelerate's
                module.forward = earlier


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a nest of tuples, lists and dictionaries with `function` applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def tensors_in(call: Call) -> list[Tensor]:
    """Return the tensors among the arguments of a call."""
    found: list[Tensor] = []
    map_tensors(found.append, (call.arguments, call.named))
    return found
