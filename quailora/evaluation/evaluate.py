"""Perplexity of a model in full precision, quantized, and quantized with an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from ..adapters.hub import adapter_folder
from ..adapters.provenance import Provenance, read_provenance
from ..adapters.saved import SavedAdapter
from ..bases import ExistingBase
from ..bases.around import check_around
from ..calibration.empty_pass import find_reach
from ..calibration.tokens import CalibrationTokens
from ..calibration.walk import Block, Walk
from ..calibration.windows import given_tokens
from ..core.statistics import InputStatistics
from ..errors import ConfigurationError, NumericalError, named
from ..models.layers import Layer, all_layers, linear_layers, stock_quantizes
from ..models.limits import check_token_ids
from ..models.load import LoadedModel, empty_model, load_model
from ..pipeline.options import Resources
from ..pipeline.targets import quantized_layers
from ..quantizers import QuantizedWeight, Quantizer
from ..quantizers.base import check_finite
from ..quantizers.identity import BaseIdentity
from ..support.choices import StrPath
from ..support.files import as_str
from ..support.machine import within_memory
from ..support.progress import counting, track
from ..support.tables import print_table
from .attach import adapted
from .base import ChosenBase, check_measured_on, choose_base
from .scores import perplexity_of
from .texts import EvaluationTexts


@final
@dataclass(frozen=True)
class Perplexity:
    """Token-level perplexity over windows that do not overlap.

    Attributes:
        perplexity: `exp` of the mean negative log likelihood (nats) of every predicted token: all but the first of each
            window, and special tokens there; infinite where that is beyond floating point.
        tokens: number of predicted tokens.
        window_losses: mean negative log likelihood of each window, for paired comparisons.
    """

    perplexity: float
    tokens: int
    window_losses: tuple[float, ...]


@torch.inference_mode()
def perplexity(
    model: Any, windows: Int[Tensor, "windows sequence_length"], description: str = "Evaluating", given: int = 1
) -> Perplexity:
    """Measure a causal language model, one window at a time.

    Args:
        model: a transformers or PEFT causal language model.
        windows: token ids of the windows.
        description: label of the progress bar.
        given: tokens at the start of each window that are not predicted.

    Raises:
        NumericalError: if a loss is NaN.
    """
    # Every token but the given ones is predicted from all tokens before it in the window: logits at position i are for
    # the token at i + 1.
    device = next(model.parameters()).device
    losses = []
    for window in track(windows, description, total=len(windows)):
        ids = window.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, given - 1 : -1]
        losses.append(functional.cross_entropy(logits.float(), ids[given:]).item())
    if any(map(math.isnan, losses)):
        raise NumericalError(
            f"{description}: expected a loss on every window, got NaN. Weights or activations are too large for the "
            "model's dtype: try `dtype='float32'`, or another checkpoint."
        )
    return Perplexity(perplexity_of(losses), len(windows) * (windows.shape[1] - given), tuple(losses))


@torch.no_grad()
def quantize_in_place(
    model: Any,
    base: Quantizer | ExistingBase,
    walk: Walk | None = None,
    on_layer: Callable[[str, QuantizedWeight], object] = lambda *_: None,
) -> None:
    """Replace the weight of every linear layer but the output head by its quantized value.

    Args:
        model: a transformers model; its layers keep computing in the model's own dtype.
        base: makes the new weights, or has them already.
        walk: through this model's linear layers, on full-precision inputs, for quantizers that need calibration.
        on_layer: called with the name and the quantized weight of each layer.
    """
    existing = base if isinstance(base, ExistingBase) else None
    if existing is not None:
        check_around(existing, model)
    layers = quantized_layers(model, {}, existing)
    if isinstance(base, Quantizer) and base.stock_config() is not None:
        layers = {name: layer for name, layer in layers.items() if stock_quantizes(layer)}
    with counting("Quantizing", len(layers)) as counter:

        def quantize(layer: Layer, inputs: InputStatistics | None = None) -> None:
            with named(layer.name):
                stored = base.quantize(layer.weight, inputs) if isinstance(base, Quantizer) else base.weight_of(layer)
                weight = stored.dequantize()
                check_finite(weight)
                layer.weight.copy_(weight)
            on_layer(layer.name, stored)
            counter.advance()

        # Statistics of a block are those of full precision: the block has run before its weights are replaced, and what
        # it returned is kept for the next one.
        def visit(block: Block) -> Mapping[str, Tensor]:
            for one in block.drain():
                quantize(one.layer, one.statistics)
            return {}

        if walk is not None:
            walk.run(visit)
            return
        for layer in layers.values():
            quantize(layer)


@final
@dataclass(frozen=True)
class Evaluation:
    """Perplexities of one base.

    Attributes:
        model: the model as the caller named it.
        quantizer: how the base was quantized.
        adapter: folder of the adapter, if there was one.
        results: "full precision", "quantized" and "quantized + adapter".
        window_length: tokens in a window.
    """

    model: str
    quantizer: str
    adapter: str | None
    results: Mapping[str, Perplexity]
    window_length: int = 0

    def show(self) -> None:
        """Print a table."""
        rows = [[name, f"{result.perplexity:.4f}"] for name, result in self.results.items()]
        tokens = next(iter(self.results.values())).tokens
        print_table(f"{self.model}, {self.quantizer}, {tokens} tokens", ("weights", "perplexity"), rows)


@within_memory("shorter windows (`sequence_length`), or `device='cpu'`")
def evaluate(
    model: StrPath,
    adapter: StrPath | None = None,
    *,
    base: Quantizer | StrPath | None = None,
    texts: EvaluationTexts = EvaluationTexts(),  # noqa: B008 # frozen
    calibration: StrPath | None = None,
    any_base: bool = False,
    resources: Resources = Resources(),  # noqa: B008
) -> Evaluation:
    """Measure perplexity in full precision, quantized, and quantized with an adapter.

    Every linear layer but the output head is quantized, or a base that is there is loaded; the adapter is attached by
    stock PEFT. The base has to be the one that the adapter was made for, as its folder says.

    Args:
        model: hub name, folder, .gguf file, or "demo".
        adapter: hub name or folder of an adapter, trained or not.
        base: a quantizer, or a checkpoint to measure on; by default what stands beside the adapter or what the adapter
            was made for, or NF4 without adapter.
        texts: one text to measure on.
        calibration: calibration text for a quantizer that needs it; needed if the adapter was made with a text of
            its own.
        any_base: measure the adapter on another base than the one it was made for, too.
        resources: what of the machine to use; the model is always in memory.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    if len(texts.named) != 1:
        raise ConfigurationError(f"Expected one text to measure on, got {len(texts.named)}. Compare takes several.")
    folder = adapter_folder(adapter) if adapter else None
    provenance = read_provenance(folder) if folder else Provenance()
    saved = SavedAdapter.read(folder) if folder else None
    quantizer = base if isinstance(base, Quantizer) else None
    place = None if base is None or quantizer is not None else str(base)
    chosen = choose_base(folder, provenance, quantizer=quantizer, base=place, calibration=as_str(calibration))
    texts.check()
    chosen.check_text()
    loaded = loaded_in_memory(str(model), resources)
    ((_, ids),) = texts.cut(loaded)
    given = given_tokens(loaded.tokenizer, texts.bos)
    walk = walk_for(chosen, str(model), loaded, resources)
    results = {"full precision": perplexity(loaded.model, ids, "Full precision", given)}
    identities: dict[str, BaseIdentity] = {}

    def identify(name: str, stored: QuantizedWeight) -> None:
        if saved is not None and saved.depends_on(name, provenance):
            identities[name] = BaseIdentity.of(stored)

    if chosen.base is not None:
        quantize_in_place(loaded.model, chosen.base, walk, identify)
    else:
        del loaded, walk  # two models may not fit
        loaded = loaded_in_memory(str(chosen.folder), resources)
        if saved is not None:
            layers = all_layers(loaded.model)
            identities = {
                name: BaseIdentity.of_dequantized(layer.weight)
                for name, layer in layers.items()
                if saved.depends_on(name, provenance)
            }
    if folder is not None:
        check_measured_on(folder, provenance, identities, chosen, any_base=any_base)
    results["quantized"] = perplexity(loaded.model, ids, "Quantized", given)
    if folder is not None:
        with adapted(loaded.model, folder) as wrapped:
            results["quantized + adapter"] = perplexity(wrapped, ids, "Quantized + adapter", given)
    return Evaluation(str(model), chosen.title, as_str(adapter), results, ids.shape[1])


def loaded_in_memory(model: str, resources: Resources) -> LoadedModel:
    """Return a model in memory."""
    trusted = resources.trust_remote_code
    return load_model(model, resources.dtype, resources.device, trust_remote_code=trusted)


def walk_for(chosen: ChosenBase, model: str, loaded: LoadedModel, resources: Resources) -> Walk | None:
    """Return the walk that a quantizer needs which has to see calibration data; None for every other base."""
    if chosen.calibration is None:
        return None
    seen = check_token_ids(loaded.model, chosen.calibration.windows(loaded.tokenizer))
    reach = find_reach(empty_model(model, resources.dtype, trust_remote_code=resources.trust_remote_code))
    layers = reach.watched(linear_layers(loaded.model))
    return Walk(loaded.model, layers, CalibrationTokens.of_windows(seen), dtype=chosen.calibration.dtype)
