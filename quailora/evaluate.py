"""Perplexity of a model in full precision, quantized, and quantized with an adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from .adapters.provenance import read_provenance
from .bases import Prequantized, StoredBase
from .calibration import Calibration, TextSource, evaluation_windows, shipped_text
from .errors import ModelError, named
from .layerwise import layers_of
from .models.layers import linear_layers
from .models.load import DeviceName, DtypeName, check_sequence_length, load_model
from .models.stream import Walk
from .outputs import write_json
from .plan import quantized_layers
from .progress import track
from .quantizers import NF4, Quantizer
from .report.settings import build
from .report.tables import print_table
from .schedules import Schedule

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class Perplexity:
    """Token-level perplexity over windows that do not overlap.

    Attributes:
        perplexity: `exp` of the mean negative log likelihood (nats) of every token but each window's first.
        tokens: number of predicted tokens.
        window_losses: mean negative log likelihood of each window, for paired comparisons.
    """

    perplexity: float
    tokens: int
    window_losses: tuple[float, ...]


@torch.inference_mode()
def perplexity(
    model: Any, windows: Int[Tensor, "windows sequence_length"], description: str = "Evaluating"
) -> Perplexity:
    """Measure a causal language model, one window at a time.

    Args:
        model: a transformers or PEFT causal language model.
        windows: token ids.
        description: label of the progress bar.
    """
    device = next(model.parameters()).device
    losses = []
    for window in track(windows, description, total=len(windows)):
        ids = window.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(functional.cross_entropy(logits.float(), ids[1:]).item())
    return Perplexity(math.exp(sum(losses) / len(losses)), len(windows) * (windows.shape[1] - 1), tuple(losses))


@torch.no_grad()
def quantize_in_place(model: Any, quantizer: Quantizer, walk: Walk | None = None) -> None:
    """Replace the weight of every linear layer but the output head by its quantized value.

    Args:
        model: a transformers model; its layers keep computing in the model's own dtype.
        quantizer: makes the new weights.
        walk: through this model's linear layers, on full-precision inputs, for calibrated quantizers.
    """
    layers = quantized_layers(model, {}, quantizer)
    if walk is None:
        for layer in track(layers.values(), "Quantizing", total=len(layers)):
            with named(layer.name):
                layer.weight.copy_(quantizer.for_layer(layer.name).quantize(layer.weight).dequantize())
        return
    for block, layer in track(layers_of(walk), "Quantizing", total=len(layers)):
        seen = block.statistics[layer.name]
        with named(layer.name):
            layer.weight.copy_(quantizer.for_layer(layer.name).quantize(layer.weight, seen).dequantize())


@contextmanager
def adapted(model: Any, adapter: Path) -> Iterator[Any]:
    """Attach an adapter by stock PEFT inside a `with` statement, and take it off at the end."""
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # PEFT passes on errors of safetensors, json and torch
        raise ModelError(f"PEFT cannot load the adapter {adapter} on this model: {error}") from error
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()


@final
@dataclass(frozen=True)
class Evaluation:
    """Perplexities of one base.

    Attributes:
        model: as it was asked for.
        quantizer: how the base was quantized.
        adapter: folder of the adapter, if there was one.
        results: "full precision", "quantized" and "quantized + adapter".
    """

    model: str
    quantizer: str
    adapter: str | None
    results: Mapping[str, Perplexity]

    def show(self) -> None:
        """Print a table."""
        rows = [[name, f"{result.perplexity:.4f}"] for name, result in self.results.items()]
        tokens = next(iter(self.results.values())).tokens
        print_table(f"{self.model}, {self.quantizer}, {tokens} tokens", ("weights", "perplexity"), rows)


def evaluate(
    model: str,
    *,
    text: str | None = None,
    text_fields: Sequence[str] = ("text",),
    quantizer: Quantizer | None = None,
    adapter: str | None = None,
    calibration: str | None = None,
    windows: int = 10,
    sequence_length: int = 2048,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
    json: str | None = None,
) -> Evaluation:
    """Measure perplexity in full precision, quantized, and quantized with an adapter.

    Every linear layer but the output head is quantized, or the base that was written with the adapter is loaded; the
    adapter is attached by stock PEFT.

    Args:
        model: hub name, folder, .gguf file, or "demo".
        text: text or .jsonl file to measure on; the shipped text by default. Do not use the calibration text.
        text_fields: text fields of a .jsonl record.
        quantizer: quantizes the base; by default the one the adapter was made for, or NF4.
        adapter: folder of a LoRA adapter.
        calibration: calibration text for a quantizer that needs it; by default as the adapter was made.
        windows: number of windows at most.
        sequence_length: tokens in a window.
        dtype: dtype of the model; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        json: file to write the result to.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    provenance = read_provenance(Path(adapter)) if adapter else {}
    chosen = base_quantizer(quantizer, provenance)
    loaded = load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    check_sequence_length(loaded.model, sequence_length)
    texts = list(TextSource(text, tuple(text_fields)).documents()) if text else [shipped_text("evaluate")]
    ids = evaluation_windows(loaded.tokenizer, texts, windows, sequence_length)
    if len(ids) < windows:
        logger.warning("The text fills %d windows, not %d.", len(ids), windows)

    own_base = saved_base(adapter, quantizer)
    packed = own_base is not None and bool(StoredBase(str(own_base)).described)
    if packed:
        chosen = Prequantized(str(own_base))
    elif own_base is None and quantizer is None:
        check_base(adapter, provenance)
    walk = None
    if chosen.calibrated and own_base is None:
        if provenance.get("inputs", "full") != "full":
            raise ModelError(
                f"The base of {adapter} depends on corrections of its own layers, so it cannot be made again. Write it "
                "with the adapter: quailora init --save-base."
            )
        recorded = Calibration.from_dict(provenance["calibration"]) if provenance else Calibration()
        source = replace(recorded, text=TextSource(calibration)) if calibration else recorded
        seen = source.windows(loaded.tokenizer)
        walk = Walk(loaded.model, linear_layers(loaded.model), seen, dtype=source.dtype)
    results = {"full precision": perplexity(loaded.model, ids, "Full precision")}
    if own_base is None or packed:
        quantize_in_place(loaded.model, chosen, walk)
    else:
        loaded = load_model(str(own_base), dtype, device, trust_remote_code=trust_remote_code)
    results["quantized"] = perplexity(loaded.model, ids, "Quantized")
    if adapter:
        with adapted(loaded.model, Path(adapter)) as wrapped:
            results["quantized + adapter"] = perplexity(wrapped, ids, "Quantized + adapter")
    evaluation = Evaluation(model, repr(chosen), adapter, results)
    if json:
        write_json(Path(json), asdict(evaluation) | {"text": text, "sequence_length": sequence_length})
    return evaluation


def saved_base(adapter: str | None, asked: Quantizer | None) -> Path | None:
    """Return the base that was written with an adapter, unless another quantizer was asked for."""
    base = Path(adapter) / "base" if adapter and asked is None else None
    return base if base is not None and base.is_dir() else None


def check_base(adapter: str | None, provenance: Mapping[str, Any]) -> None:
    """Raise a `ModelError` if an adapter needs a base that only its own run could make."""
    schedule = build(Schedule, provenance["schedule"]) if "schedule" in provenance else None  # type: ignore[type-abstract]
    if schedule is not None and schedule.changes_base:
        raise ModelError(f"{adapter} belongs on the base that was written with it, and {adapter}/base is not there.")


def base_quantizer(asked: Quantizer | None, provenance: Mapping[str, Any]) -> Quantizer:
    """Return the quantizer to evaluate with: the one asked for, else the adapter's own, else NF4."""
    recorded = build(Quantizer, provenance["quantizer"]) if provenance else None  # type: ignore[type-abstract]
    if asked is not None and recorded is not None and asked != recorded:
        logger.warning("This adapter was made for %r; on %r it corrects another error.", recorded, asked)
    return asked or recorded or NF4()
