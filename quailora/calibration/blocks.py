"""A decoder as a chain of blocks: the calls that the model makes of them, without running them.

A model is run with its blocks stubbed. That gives the first block's input and the other arguments of every block
(masks, positions), from the model's own code, so no family needs code here. What makes a model a chain is checked on
the way: each block is called once, in order, gets what the block before it returned, and gets nothing else that
depends on earlier blocks. A model that breaks off when its blocks are stubbed is no chain, whatever it raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import ModelError, QuailoraError, summary
from ..models.layers import output_head
from ..models.weights import execution_device, resident

FROM_MODELS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)
"""What the code of a model can raise that is run in a way or on data that it was not made for."""

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
        hidden: Tensor = self.arguments[slot] if isinstance(slot, int) else self.named[slot]
        return hidden

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
        rest: what a block returns in a tuple behind hidden states, without tensors; None if it returns no tuple.
    """

    model: Any
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    slot: Slot
    rest: tuple[Any, ...] | None
    _kept: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def run(self, index: int, call: Call, hidden: Tensor) -> Tensor:
        """Run one block, which has to be resident, on hidden states; return the next ones."""
        call = call.with_hidden(self.slot, hidden)
        output = self.blocks[index](*call.arguments, **call.named)
        return _hidden(output)

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
            return answer if self.rest is None else (answer, *self.rest)

        with forward_replaced(self.blocks, [stub] * len(self.blocks)):
            run_body(self.model, ids)
        return calls

    def _shared(self, call: Call) -> Call:
        return Call(map_tensors(self._keep, call.arguments), map_tensors(self._keep, call.named))

    def _keep(self, tensor: Tensor) -> Tensor:
        for earlier in self._kept:
            if earlier.shape == tensor.shape and earlier.dtype == tensor.dtype and torch.equal(earlier, tensor):
                return earlier
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
    name, blocks = _longest_list(model)
    names = tuple(f"{name}.{index}" for index in range(len(blocks)))
    try:
        with resident(blocks[0]):
            calls, outputs = _probed(model, names, blocks, probe)
        # The probe gave every stub an output of its own, so identity of objects tells where the next block receives it.
        slots = {call.slot_of(_hidden(output)) for call, output in zip(calls[1:], outputs, strict=False)}
        if len(slots) > 1 or None in slots:
            raise _no_chain(model, f"blocks in {name} do not receive what the block before them returned")
        slot = slots.pop() if slots else (0 if calls[0].arguments else "hidden_states")
        assert slot is not None
        rest = map_tensors(lambda _: None, outputs[0][1:]) if isinstance(outputs[0], tuple) else None
        chain = Chain(model, names, blocks, slot, rest)
        # Once more with zeros as outputs: if other arguments of a block change, it gets more than hidden states from
        # earlier blocks, such as a residual stream beside them, and cannot be run from hidden states alone.
        repeated = chain.stubbed_run(probe, torch.zeros_like)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except FROM_MODELS as error:
        raise _no_chain(model, f"it ends in {summary(error)} when they are left out") from error
    for call, again in zip(calls, repeated, strict=True):
        before, after = (tensors_in(made.with_hidden(slot, None)) for made in (call, again))
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            raise _no_chain(model, f"blocks in {name} receive more than hidden states from earlier blocks")
    return chain


def _longest_list(model: Any) -> tuple[str, tuple[nn.Module, ...]]:
    """Return the name and the modules of the largest list of modules that lies in no other list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    outermost = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outermost:
        raise _no_chain(model, "it has no list of modules")
    name = max(outermost, key=lambda name: sum(parameter.numel() for parameter in outermost[name].parameters()))
    return name, tuple(outermost[name])


def _probed(
    model: Any, names: Sequence[str], blocks: Sequence[nn.Module], probe: Int[Tensor, "1 tokens"]
) -> tuple[list[Call], list[Any]]:
    """Run the first block and stubs of the others, each of which returns other hidden states; return calls and outputs.

    Raises:
        ModelError: if the blocks are not run once each, in order.
    """
    order: list[int] = []
    calls: list[Call] = []
    outputs: list[Any] = []
    run_first = blocks[0].forward

    def stub(index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            order.append(index)
            calls.append(Call(arguments, named))
            if index == 0 and not outputs:
                outputs.append(run_first(*arguments, **named))
            elif not outputs:
                raise _no_chain(model, f"{names[index]} runs before {names[0]}")
            else:
                fresh = torch.full_like(_hidden(outputs[0]), index)
                outputs.append((fresh, *outputs[0][1:]) if isinstance(outputs[0], tuple) else fresh)
            return outputs[-1]

        return forward

    with forward_replaced(blocks, [stub(index) for index in range(len(blocks))]):
        run_body(model, probe)
    if order != list(range(len(blocks))):
        raise _no_chain(model, f"its {len(blocks)} blocks in {names[0].rpartition('.')[0]} are not run once, in order")
    return calls, outputs


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"Expected a block to return hidden states, got {type(hidden).__name__}.")
    return hidden


def _no_chain(model: Any, why: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be run block by block: {why}.")


def run_body(model: Any, ids: Int[Tensor, "samples length"]) -> None:
    """Run a model without the product with its output head, on the model's device."""
    # The head's logits take more time and memory than all blocks of a small model, and nothing here reads them.
    device, head = execution_device(model), output_head(model)
    ids = ids if device.type == "meta" else ids.to(device)  # an empty model is run by `empty_pass`
    parameters = inspect.signature(model.forward).parameters.values()
    takes_cache = any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in parameters)
    heads = [head] if head is not None else []
    with forward_replaced(heads, [_one_logit] * len(heads)):
        model(input_ids=ids, **({"use_cache": False} if takes_cache else {}))


def _one_logit(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden[..., :1]


@contextmanager
def explained(model: Any) -> Iterator[None]:
    """Turn what the code of a model raises on calibration windows into a `ModelError`."""
    try:
        yield
    except (QuailoraError, torch.OutOfMemoryError):
        raise
    except FROM_MODELS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run on calibration windows: its code ends in {summary(error)}. If that "
            "is about dtypes, try `calibration_dtype='model'`; if about lengths, another `sequence_length`."
        ) from error


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
    tensors: list[Tensor] = []
    map_tensors(tensors.append, (call.arguments, call.named))
    return tensors
