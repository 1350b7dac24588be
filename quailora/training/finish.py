"""After training: fit the adapter of a model in memory again, to the full-precision model with what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen import check_none_frozen
from ..adapters.lora import PREFIX
from ..adapters.saved import SavedAdapter
from ..adapters.wrapped import WrappedLayer, wrapped_layers
from ..bases.live import LiveBase
from ..calibration.loader import all_tokens
from ..core.objective import Factors
from ..errors import ConfigurationError
from ..methods.recipes import Recipe
from ..models.layers import Layer, all_layers
from ..models.load import load_model, model_in_memory
from ..models.weights import replaced
from ..pipeline.asked import Asked, weights_of
from ..pipeline.initialize import fit, reader_for
from ..support import distributed
from ..support.files import StrPath, folder_of
from ..support.progress import shown


@torch.no_grad()
def finish(
    peft_model: Any,
    dataloader: Iterable[Any],
    *,
    initial: StrPath | Mapping[str, Factors] | None,
    weights: Any = None,
    recipe: Recipe | str = "best",
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Fit a trained adapter again, so that it makes up for the quantization of the model with what was trained.

    Training leaves behind `Q + s B A`, which differs from the full-precision model with the same change,
    `W + s (B A - B0 A0)`, by what the first correction could not reach. The latter model is calibrated on, and the
    factors become those of a correction that brings the quantized model close to it, at the same rank. Both the change
    and the correction have to fit into this rank.

    Args:
        peft_model: the trained `PeftModel`, quantized. Its factors are changed in place.
        dataloader: batches as for `initialize`, of the data of the training.
        initial: the adapter before training: the folder that it was saved to, or what `factors_of` returned; None for
            plain LoRA, whose `lora_B` was zero.
        weights: the full-precision model, see `initialize`; it is loaded into memory as a whole.
        recipe: name of a method, or a `Recipe`, as for `initialize`.
        adapter_name: name of the adapter.
        show_progress_bar: whether to show one where a person is watching.

    Returns:
        What `initialize` returns.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    adapted = wrapped_layers(peft_model, adapter_name)
    check_none_frozen(adapted.values(), "`finish`")
    before = starts_of(initial, adapted)
    base = LiveBase(peft_model)
    given = weights_of(base, weights, is_live=bool(base.layers))
    if given is None:
        raise ConfigurationError(
            "Expected a quantized model, got one in full precision, where there is no error to correct."
        )
    loaded = load_model(given, device=device_of(adapted)) if isinstance(given, str) else model_in_memory(given)
    layers = all_layers(loaded.model)
    changed = {name: changed_weight(layers[name], layer, before.get(name)) for name, layer in adapted.items()}
    asked = Asked.of(peft_model, adapter_name, loaded.model, recipe, None)
    distributed.join(asked.device.type)
    with shown(show_progress_bar), replaced(layers, changed):
        reader = reader_for(peft_model, adapter_name, None, None)
        tokens = all_tokens(dataloader, reader, asked.enough, gather=True)
        return fit(asked, tokens, adapter_name)


def factors_of(peft_model: Any, adapter_name: str = "default") -> dict[str, Factors]:
    """Return copies of the factors of an adapter as PEFT stores them, by the name of their layer; see `finish`."""
    return {name: layer.kept() for name, layer in wrapped_layers(peft_model, adapter_name).items()}


def saved_factors(folder: Path) -> dict[str, Factors]:
    """Return the factors of a saved adapter as PEFT stores them, by the name of their layer."""
    saved = SavedAdapter.read(folder)
    return {stem.removeprefix(PREFIX): saved.factors(stem) for stem in saved.stems}


def starts_of(
    initial: StrPath | Mapping[str, Factors] | None, adapted: Mapping[str, WrappedLayer]
) -> Mapping[str, Factors]:
    """Return the factors before training, by layer; none for plain LoRA.

    Raises:
        ConfigurationError: if they are of other layers or shapes.
    """
    if initial is None:
        return {}
    starts = initial if isinstance(initial, Mapping) else saved_factors(folder_of(initial))
    shapes = {name: (len(pair.lora_B), pair.lora_A.shape[1]) for name, pair in starts.items()}
    expected = {name: layer.shape for name, layer in adapted.items()}
    if shapes != expected:
        name = next(name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name))
        raise ConfigurationError(
            f"Expected the factors of this adapter before training, got others: the weight of {name} is of the shape "
            f"{shapes.get(name)} there and {expected.get(name)} in the model."
        )
    return starts


def changed_weight(layer: Layer, adapted: WrappedLayer, before: Factors | None) -> Tensor:
    """Return `W + s (B A - B0 A0)`, in the dtype of `W`."""
    weight, (lora_B, lora_A) = layer.weight, adapted.parameters
    change = lora_B.float() @ lora_A.float()
    if before is not None:
        change -= before.lora_B.to(change) @ before.lora_A.to(change)
    return (weight + (adapted.scale * change).to(weight.device)).to(weight.dtype)


def device_of(adapted: Mapping[str, WrappedLayer]) -> Any:
    """Return the kind of device that the model is on."""
    kind = next(iter(adapted.values())).parameters.lora_A.device.type
    return kind if kind == "cuda" else "cpu"
