"""Measure what each choice would cost in each layer: the divergence of predictions, to the second order."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..calibration.capture import arithmetic
from ..calibration.gradients import Caught, output_gradients, weight_gradient
from ..calibration.tokens import CalibrationTokens
from ..calibration.windows import CalibrationDtype, of_one_length
from ..errors import NumericalError
from ..evaluation.scores import measure
from ..methods.recipes import find_recipe
from ..models.layers import Layer, kind
from ..models.load import LoadedModel
from ..pipeline.store import Store, StoredLayer
from ..quantizers import Quantizer
from ..support.progress import counting
from .choices import Choice
from .layer_errors import RoundingError, quantizers_of
from .made_up import later_layers, shares_left
from .question import Question

logger = logging.getLogger("quailora")

PIECE_TOKENS = 256
"""Tokens of held-out text that predictions are sampled for at a time."""

PASSES = 256
"""Backward passes. The standard error of a cost is `sqrt(2 / PASSES)` of it, a twelfth, before it is pooled."""

_TOGETHER = 8  # backward passes that errors are read from the store for at once; each holds gradients of all outputs

# Let E be the error of one layer, and g the gradient of log q(y) with respect to its weight, for the predictions q of
# a model at one place of a text. To the second order in E
#
#     KL(q || q_E) = 1/2 E_y <E, g>^2,    y drawn from q,
#
# with the Fisher information in place of the second derivative. Gradients of labels that are drawn at different places
# of a text have a mean of zero given all before, so that they are uncorrelated, and the sum over all places needs one
# backward pass: the expected square of <E, sum_t g_t> is the sum of the expected squares. It holds for every error of
# the layer, so that one pass serves all choices of all layers. This is exact in what an error does to single tokens
# and directions. Errors of different layers are nearly uncorrelated, so that what they cost adds up, less what later
# layers make up for; see `made_up.py`.
#
# A programme that chooses among many costs chooses those that came out low by chance. Errors of several quantizers are
# independent draws of the same kind of noise, whose cost is in proportion to its square, and adapters of one rank take
# the same directions off each. So what a unit of squared error costs is taken from all quantizers together, for each
# layer and rank. Five quantizers make the variance a fifth. In SmolLM2, plans that were made from one half of the
# passes then cost 4 % less on the other half.


def held_out_pieces(tokens: CalibrationTokens) -> Int[Tensor, "pieces length"]:
    """Return the text that bases and adapters are not fitted to, cut into pieces; all of its tokens count.

    Raises:
        CalibrationError: if there are too few sequences to hold some out, or they are too short.
    """
    batches, held_from = tokens.batches(1, hold_out=True)
    sequences = [ids for batch in batches[held_from:] for ids in batch.ids]
    return of_one_length(sequences, PIECE_TOKENS)[:PASSES]


def weight_in(stored: StoredLayer) -> Tensor:
    """Return the weight of a layer in the reference network."""
    assert stored.dequantized is not None  # every layer is kept with it
    return stored.dequantized


def measure_costs(
    question: Question,
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    pieces: Int[Tensor, "pieces length"],
    store: Store,
    dtype: CalibrationDtype = "auto",
) -> Float[Tensor, "layers choices"]:
    """Return what each choice costs in each layer, in nats per token; infinite where a layer cannot have it.

    It is pooled over quantizers, see `pooled`, and less what later layers make up for, see `shares_left`. Passes
    that an earlier process has carried out are not carried out again.

    Args:
        question: the choices.
        loaded: the model in full precision.
        layers: its layers.
        pieces: token ids.
        store: has the errors of each layer.
        dtype: arithmetic, see `Calibration`.

    Raises:
        NumericalError: if a gradient is NaN or infinite; the message names its layer.
    """
    labels = -(-PASSES // len(pieces))  # that are drawn for each piece
    keys = [f"passes-{number}" for number in range(len(pieces))]
    logger.info("Measuring what errors cost: %d backward passes on held-out text.", labels * len(pieces))
    done = labels * sum(map(store.has, keys))
    with counting("Measuring costs", labels * len(pieces), done) as counter:
        for number, (key, piece) in enumerate(zip(keys, pieces, strict=True)):
            if not store.has(key):
                found = _sampled(question, loaded.model, layers, piece, store, labels, number, dtype, counter.advance)
                store.save(key, StoredLayer(packed=found))
    costs, alone, made_up = (
        torch.stack([store.load(key).packed[what] for key in keys]).mean(0) for what in ("costs", "alone", "made_up")
    )
    left = shares_left(list(layers), alone, made_up, find_recipe(question.recipe).step)
    shares = {kind(name): f"{1 - share:.0%} of {kind(name)}" for name, share in zip(layers, left.tolist(), strict=True)}
    logger.info("Of what errors cost, later layers make up for %s.", ", ".join(shares.values()))
    rows = []
    for share, name, row in zip(left, layers, costs, strict=True):
        read = _errors_of(question.choices, store.load(name), torch.device("cpu"))
        squares = {quantizer: error.squares().tolist() for quantizer, error in read.items()}
        rows.append(share * pooled(question.choices, row, _of_choices(question.choices, squares)))
    return torch.stack(rows)


def pooled(
    choices: Sequence[Choice], costs: Float[Tensor, " choices"], squares: Float[Tensor, " choices"]
) -> Float[Tensor, " choices"]:
    """Return the costs of a layer, in proportion to squared errors among the quantizers of each rank.

    Args:
        choices: the choices.
        costs: costs of each choice as they were measured; infinite where the layer cannot have it.
        squares: squared norms of their errors.
    """
    found = costs.clone()
    for rank in {choice.rank for choice in choices}:
        same = torch.tensor([choice.rank == rank and choice.quantizer is not None for choice in choices])
        same &= costs.isfinite() & (squares > 0)
        if same.any():
            found[same] = (costs[same] / squares[same]).mean() * squares[same]
    return found


def _sampled(
    question: Question,
    model: Any,
    layers: Mapping[str, Layer],
    piece: Int[Tensor, " length"],
    store: Store,
    labels: int,
    seed: int,
    dtype: CalibrationDtype,
    on_pass: Callable[[], object],
) -> dict[str, Tensor]:
    """Return the costs, and what `shares_left` takes, as means over some labels for one piece of text."""
    total = torch.zeros(len(layers), len(question.choices), dtype=torch.float64)
    alone, made_up = torch.zeros(2, len(layers), dtype=torch.float64)
    later = later_layers(list(layers)).double()
    scale = 2 * labels * (len(piece) - 1)

    def add(passes: Sequence[Caught]) -> None:
        # What the error of each layer does, and what its target does.
        errors, targets = torch.zeros(2, len(passes), len(layers), dtype=torch.float64)
        for row, (name, layer) in enumerate(layers.items()):
            stored = store.load(name)
            changed = (layer.weight - weight_in(stored).to(layer.weight)).float().flatten()
            read = _errors_of(question.choices, stored, changed.device)
            read = {key: replace(one, error=one.error.float()) for key, one in read.items()}  # once for all passes
            for number, one in enumerate(passes):
                if name not in one:  # its output is not used for this text
                    continue
                # Inputs of a layer may come from one on another device.
                calls = [(inputs.to(changed.device), outputs.to(changed.device)) for inputs, outputs in one[name]]
                gradient = weight_gradient(calls)
                target = torch.dot(changed, gradient.flatten()).item()
                if not math.isfinite(target):
                    raise NumericalError(f"The gradient of {name} is NaN or infinite. Try another calibration dtype.")
                known = {key: error.products(gradient, calls).tolist() for key, error in read.items()}
                total[row] += _of_choices(question.choices, known).square() / scale
                # The layer of the reference network is T - E, so that T - W is E less the difference of W from it.
                ranks = known[question.reference.quantizer]
                error = ranks[min(question.reference.rank, len(ranks) - 1)]
                errors[number, row] = error
                targets[number, row] = error - target
        alone.add_(errors.square().sum(0) / scale)
        made_up.add_((errors * (targets @ later.T)).sum(0) / scale)

    with output_gradients(model, layers) as caught:
        with arithmetic(model, dtype):
            logits = model(input_ids=piece[None].to(next(model.parameters()).device), use_cache=False).logits[0, :-1]
        predicted = torch.log_softmax(logits.float(), dim=-1)
        # Drawn on the CPU, so that every device goes through the same labels.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(predicted.detach().exp().cpu(), labels, replacement=True, generator=generator)
        passes: list[Caught] = []
        for label in range(labels):
            chosen = predicted.gather(1, drawn[:, label : label + 1].to(predicted.device))
            torch.autograd.backward(chosen.sum(), retain_graph=label + 1 < labels)
            passes.append(dict(caught))
            caught.clear()
            if len(passes) == _TOGETHER or label + 1 == labels:
                add(passes)
                passes.clear()
            on_pass()
    return {"costs": total, "alone": alone, "made_up": made_up}


def _errors_of(
    choices: Sequence[Choice], stored: StoredLayer, device: torch.device
) -> dict[Quantizer | None, RoundingError]:
    """Return what each quantizer leaves of a layer."""
    quantizers = enumerate(quantizers_of(choices))
    return {quantizer: RoundingError.read(stored.packed, number, device) for number, quantizer in quantizers}


def _of_choices(
    choices: Sequence[Choice], of_ranks: Mapping[Quantizer | None, list[float]]
) -> Float[Tensor, " choices"]:
    """Return the number of each choice from those of the ranks that a layer can carry; infinite for higher ranks."""
    every: dict[Quantizer | None, list[float]] = {None: [0.0], **of_ranks}  # full precision has no error
    found = ((every[choice.quantizer], choice.rank) for choice in choices)
    return torch.tensor([known[rank] if rank < len(known) else math.inf for known, rank in found], dtype=torch.float64)


def divergence_of_reference(
    loaded: LoadedModel, layers: Mapping[str, Layer], pieces: Int[Tensor, "pieces length"], store: Store
) -> float:
    """Return the divergence of the reference network's predictions from full precision, in nats per token."""
    weights = {name: weight_in(store.load(name)) for name in layers}
    return measure(loaded.model, layers, {"reference": weights}, pieces)["reference"].divergence
