"""Load a base with its adapter in one call, to train or to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapters.frozen import freeze
from ..adapters.hub import adapter_folder
from ..adapters.provenance import Origin, Provenance, read_provenance, unknown_base
from ..adapters.saved import SavedAdapter
from ..bases.live import LiveBase
from ..errors import ConfigurationError, ModelError, named, summary
from ..models.layers import all_layers
from ..models.locate import NO_ADAPTER, quiet_transformers, resolve
from ..models.quantized import quantization_of
from ..quantizers.identity import BaseIdentity
from ..support.files import StrPath
from .attach import with_adapter
from .base import ChosenBase, check_measured_on


def load(adapter: StrPath, *, trainable: bool = False, any_base: bool = False, **from_pretrained: Any) -> Any:
    """Return the base that an adapter was made for, with the adapter in it.

    The base is the one beside the adapter, the quantized checkpoint that it was made for, or the full-precision model
    quantized by bitsandbytes while it loads. The codes and scales of its layers are compared with those that the
    adapter makes up for.

    Args:
        adapter: hub name or folder of an adapter that quailora made, trained or not.
        trainable: let the adapter be trained, all but the directions that `frozen_rank` has set apart; else the model
            is for inference.
        any_base: load the adapter on another base than the one that it was made for, too, with a warning.
        from_pretrained: passed on to `AutoModelForCausalLM.from_pretrained`, such as `device_map` or `dtype`; the dtype
            is that of the checkpoint by default.

    Returns:
        A `PeftModel`.

    Raises:
        ModelError: if the folder does not say what the base is, the base cannot be had, or it is another one.
        ConfigurationError: if a `quantization_config` is passed, which the adapter knows.
    """
    if "quantization_config" in from_pretrained:
        raise ConfigurationError("The adapter says how its base is quantized. Leave out quantization_config.")
    folder = adapter_folder(adapter)
    provenance, saved = read_provenance(folder), SavedAdapter.read(folder)
    if provenance.origin is None:
        raise ModelError(f"{unknown_base(folder)} Load the base yourself, and the adapter with PEFT.")
    name, config = place_of_base(folder, provenance.origin)
    model = loaded_base(name, config, {"dtype": "auto", **from_pretrained})
    chosen = ChosenBase(None, f"{name}, as it was loaded")
    identities = base_identities(model, saved, provenance)
    check_measured_on(folder, provenance, identities, chosen, any_base=any_base)
    adapted = with_adapter(model, folder, trainable=trainable)
    if trainable and provenance.origin.frozen_rank:
        freeze(adapted, provenance.origin.frozen_rank)
    return adapted


def place_of_base(folder: Path, origin: Origin) -> tuple[str, Any]:
    """Return where the base of an adapter is loaded from, and the configuration that quantizes it, if it is not yet.

    Raises:
        ModelError: if stock packages cannot load it.
    """
    # The order in which `init` can have left a base: written beside the adapter, there before it, or made while it
    # loads.
    beside = folder / "base"
    if beside.is_dir():
        return str(beside), None
    if origin.checkpoint is not None:
        return resolve(origin.checkpoint), None
    quantizer = origin.stock_quantizer
    if quantizer is None:
        raise ModelError(
            f"The base of {folder} is not made while a model loads, and it is not beside the adapter. Copy the folder "
            "base that was written with it, or make the adapter again with its base."
        )
    from transformers import BitsAndBytesConfig

    return resolve(origin.model), BitsAndBytesConfig(**(quantizer.stock_config() or {}))


def loaded_base(name: str, config: Any, arguments: dict[str, Any]) -> Any:
    """Return a base, quantized while it loads if there is a configuration.

    Raises:
        ModelError: if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    if config is None and any(key.startswith("+:") for key in quantization_of(name).get("dynamic") or {}):
        raise ModelError(
            f"The layers of the base {name!r} have different bits, which transformers does not load. Load it by "
            "`GPTQModel.load` of gptqmodel, and the adapter by PEFT; the card beside the adapter has the lines."
        )
    quantized = {} if config is None else {"quantization_config": config}
    try:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(name, adapter_kwargs=NO_ADAPTER, **quantized, **arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"Cannot load the base {name!r} ({summary(error)}).") from error


def base_identities(model: Any, saved: SavedAdapter, provenance: Provenance) -> dict[str, BaseIdentity]:
    """Return the identity of each layer of a base that an adapter depends on."""
    # A quantized model is compared by codes and scales; a dequantized base has only the sketch of its weights.
    live = LiveBase(model)
    identities = {}
    for name in sorted(live.layers):
        if saved.depends_on(name, provenance):
            identities[name] = BaseIdentity.of(live.weight(name, torch.float32))
    for name, layer in all_layers(model).items() if not live.layers else ():
        if saved.depends_on(name, provenance):
            with named(name):
                identities[name] = BaseIdentity.of_dequantized(layer.weight)
    return identities
