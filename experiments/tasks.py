"""Accuracy on multiple choice, by the rules of the language model evaluation harness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .scoring import row_losses

TASKS = ("piqa", "arc_easy", "boolq", "copa")

_TOKENS = 4096  # of a batch, padding included


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        context: text before the answer.
        choices: the answers.
        gold: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Answered:
    """Which items a model answered right.

    Attributes:
        accuracy: by the likelihood of the answers.
        normalized: by the likelihood of the answers divided by their length in characters.
    """

    accuracy: list[bool]
    normalized: list[bool]


def read_items(file: Path, limit: int | None = None) -> list[Item]:
    """Return the first items of a task."""
    lines = file.read_text(encoding="utf-8").splitlines()[:limit]
    return [as_item(json.loads(line), file.stem) for line in lines]


def as_item(row: dict[str, Any], task: str) -> Item:
    """Return a row as an item: questions are followed by `Answer:`, and beginnings of sentences (COPA) by their end."""
    query = row["query"].strip()
    return Item(query if task == "copa" else f"{query}\nAnswer:", tuple(row["choices"]), row["gold"])


def answered(model: Any, tokenizer: Any, items: Sequence[Item], *, exact: bool = False) -> Answered:
    """Return which items a model answers right.

    An answer is scored by the sum of the log-likelihoods of its tokens after the context, from which a space separates
    it. Context and answer are tokenized together, and what the context alone does not have is the answer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        items: the questions.
        exact: compute in the dtype of the model, not in the arithmetic of training.
    """
    requests = [request for item in items for request in requests_of(item, tokenizer)]
    scores = iter(likelihoods(model, requests, exact=exact))
    plain, normalized = [], []
    for item in items:
        values = torch.tensor([next(scores) for _ in item.choices], dtype=torch.float64)
        lengths = torch.tensor([len(choice) for choice in item.choices])
        plain.append(values.argmax().item() == item.gold)
        normalized.append((values / lengths).argmax().item() == item.gold)
    return Answered(plain, normalized)


def requests_of(item: Item, tokenizer: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the tokens of each answer after its context, and how many of them are the context."""
    context = len(tokenizer(item.context).input_ids)
    for choice in item.choices:
        yield torch.tensor(tokenizer(f"{item.context} {choice}").input_ids), context


@torch.no_grad()
def likelihoods(model: Any, requests: Sequence[tuple[Tensor, int]], *, exact: bool = False) -> list[float]:
    """Return the log-likelihood of each answer, in nats."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index][0]))
    found = [0.0] * len(requests)
    while order:
        size = max(1, _TOKENS // len(requests[order[-1]][0]))
        chosen, order = order[-size:], order[:-size]
        rows, first = [requests[index][0] for index in chosen], min(requests[index][1] for index in chosen)
        for index, losses in zip(chosen, row_losses(model, rows, first, exact=exact), strict=True):
            found[index] = -losses[requests[index][1] - first :].sum().item()
    return found


def bits(right: Sequence[bool]) -> str:
    """Return which items are right as a string of 0 and 1, which takes little space in a file of results."""
    return "".join(map(str, map(int, right)))
