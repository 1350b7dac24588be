"""Perplexity and divergence of many variants of one model, side by side on the same windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ..families import Correction
from ..models.layers import Layer
from ..models.weights import biased, replaced
from ..support.machine import free_memory
from ..support.progress import counting, watched

logger = logging.getLogger("quailora")

_TOKENS = 256  # tokens whose whole distributions are compared at a time


def perplexity_of(losses: Sequence[float]) -> float:
    """Return `exp` of the mean of losses (nats a token), infinite where that is beyond floating point."""
    try:
        return math.exp(sum(losses) / len(losses))
    except OverflowError:
        return math.inf


@final
@dataclass(frozen=True)
class Scores:
    """Scores of a variant on a text. Each number is a mean over the predicted tokens of a window, in nats.

    Attributes:
        losses: mean negative log likelihood of each window.
        divergences: `KL(p || q)` of the variant's distribution `q` from that of full precision `p`, window by window.
    """

    losses: tuple[float, ...]
    divergences: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """`exp` of the mean loss; infinite where that is beyond floating point."""
        return perplexity_of(self.losses)

    @property
    def divergence(self) -> float:
        """Mean divergence."""
        return sum(self.divergences) / len(self.divergences)


@final
@dataclass(frozen=True)
class Difference:
    """A mean paired difference over windows, with its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, first: Scores, second: Scores) -> Difference:
        """Return the loss of the first less that of the second, paired by window: below zero, the first is better."""
        from scipy import stats  # takes a second to load

        # Windows differ in difficulty far more than variants differ on a window. The difference of both losses on the
        # same window takes the difficulty out, and Student's t says how far the mean of a few such differences can be
        # off.
        pairs = zip(first.losses, second.losses, strict=True)
        test = stats.ttest_1samp([a - b for a, b in pairs], 0.0)
        interval = test.confidence_interval(0.95)
        mean = sum(first.losses) / len(first.losses) - sum(second.losses) / len(second.losses)
        return cls(mean, float(interval.low), float(interval.high))


@final
class Corrected(Mapping[str, Tensor]):
    """The weights `Q + C` of a variant, computed when they are asked for, and its biases.

    Args:
        quantized: `Q` of each layer, maybe memory-mapped.
        corrections: adapters of the layers that have some, before PEFT's scaling.
        device: the device to compute on.
    """

    def __init__(
        self,
        quantized: Mapping[str, Tensor],
        corrections: Mapping[str, Correction],
        device: torch.device | str = "cpu",
    ) -> None:
        self._quantized = quantized
        self._corrections = corrections
        self._device = device

    def __getitem__(self, layer: str) -> Tensor:
        weight = self._quantized[layer].to(self._device)
        if layer not in self._corrections:
            return weight
        change = self._corrections[layer].to(self._device).change(weight.float())
        return (weight.float() + change.weight).to(weight.dtype)

    def biases(self) -> dict[str, Tensor]:
        """Return what adapters add to the outputs of layers for every token."""
        found: dict[str, Tensor] = {}
        for layer, correction in self._corrections.items():
            if correction.family.needs_mean:
                bias = correction.to(self._device).change(self._quantized[layer].to(self._device).float()).bias
                found |= {} if bias is None else {layer: bias}
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._quantized)

    def __len__(self) -> int:
        return len(self._quantized)


def biases_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the biases that come with weights, which only adapters have."""
    return weights.biases() if isinstance(weights, Corrected) else {}


@torch.inference_mode()
def measure(
    model: Any,
    layers: Mapping[str, Layer],
    variants: Mapping[str, Mapping[str, Tensor]],
    windows: Int[Tensor, "windows sequence_length"],
    description: str = "Evaluating",
    given: int = 1,
) -> dict[str, Scores]:
    """Measure variants of a model that differ in the weights of its linear layers.

    The model is run in full precision on as many windows as there is memory for its predictions. Then each variant is
    put in place and run on these windows, so that its weights are made and copied rarely.

    Args:
        model: a transformers causal language model in full precision, in memory.
        layers: its layers.
        variants: for each variant the weights of its layers by name; layers without a weight stay as they are.
        windows: token ids of the windows.
        description: label of the progress bar.
        given: tokens at the start of each window that are not predicted.
    """
    # Full precision is run first because every variant is compared with its distributions, which take `length *
    # vocabulary` numbers a window. Putting a variant in place costs a copy of all weights, so it is done once for as
    # many windows as fit.
    device = next(model.parameters()).device
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with counting(description, len(windows) * len(variants)) as counter:
        for part in torch.split(windows.to(device), windows_at_once(model, windows.shape[1])):
            references = [log_probabilities(predict(model, ids, given)) for ids in part]
            for name, weights in variants.items():
                with replaced(layers, weights), biased(layers, biases_of(weights)):
                    for ids, reference in zip(part, references, strict=True):
                        scores[name].append(score(reference, predict(model, ids, given), ids[given:]))
                        counter.advance()
                if not watched():  # where nobody sees a progress bar
                    logger.info("%s: %s, %d of %d windows.", description, name, len(scores[name]), len(windows))
    return {name: Scores(*map(tuple, zip(*pairs, strict=True))) for name, pairs in scores.items()}


def predict(model: Any, ids: Int[Tensor, " tokens"], given: int) -> Float[Tensor, "predicted vocabulary"]:
    """Return the logits of every token of a window but the first, which are given."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, given - 1 : -1]
    return logits


def windows_at_once(model: Any, length: int) -> int:
    """Return for how many windows the distributions of all tokens fit into an eighth of the free memory."""
    vocabulary = len(model.get_output_embeddings().weight)
    return max(1, free_memory(next(model.parameters()).device) // 8 // (4 * length * vocabulary))


def log_probabilities(logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logarithm of each distribution, in float32."""
    return functional.log_softmax(logits.float(), dim=-1)


def score(
    expected: Float[Tensor, "tokens vocabulary"],
    logits: Float[Tensor, "tokens vocabulary"],
    ids: Int[Tensor, " tokens"],
) -> tuple[float, float]:
    """Return the mean negative log likelihood of tokens, and the mean divergence from what was expected, in nats.

    Args:
        expected: logarithms of the full-precision distributions.
        logits: logits of the variant.
        ids: the tokens that really follow.
    """
    # In pieces of the window: the intermediate results of a loss over a vocabulary of 150,000 take several times the
    # logits.
    loss = apart = 0.0
    for log_p, part, following in zip(*(torch.split(rows, _TOKENS) for rows in (expected, logits, ids)), strict=True):
        log_q = log_probabilities(part)
        loss += functional.nll_loss(log_q, following, reduction="sum").item()
        # KL(p || q) = sum_x p(x) (ln p(x) - ln q(x)), from logarithms on both sides, which do not underflow.
        apart += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return loss / len(ids), apart / len(ids)
