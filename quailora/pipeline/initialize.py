"""A `PeftModel` in memory: calibrate on its full-precision weights, and put corrections into its adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch

from ..adapters.frozen import freeze_layers
from ..adapters.frozen_start import noting_start
from ..adapters.lora import PREFIX
from ..adapters.provenance import Origin
from ..adapters.tuned import TunedLayer, adapter_of, place_shared, tensors_of, tuned_layers
from ..adapters.wrapped import config_of, trained, wrapped_layers
from ..calibration.loader import LoaderReader, all_tokens
from ..calibration.tokens import CalibrationTokens
from ..methods.recipes import Recipe
from ..quantizers import Quantizer
from ..support import distributed
from ..support.progress import shown
from .asked import Asked

logger = logging.getLogger("quailora")

_CAUSAL = "CAUSAL_LM"


@torch.no_grad()
def initialize(
    peft_model: Any,
    dataloader: Iterable[Any],
    *,
    weights: Any = None,
    recipe: Recipe | str = "quailora",
    adapter_name: str = "default",
    forward_fn: Callable[[Any, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = None,
    callback: Callable[[Any, str], bool] | None = None,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    quantizer: Quantizer | None = None,
    frozen_rank: int | None = None,
) -> dict[str, Any]:
    """Let the adapter of a model in memory make up for the quantization of the model, before it is trained.

    Called between `get_peft_model` and the training. The full-precision model is run on the tokens block by block, and
    the parameters of the adapter are changed in place, with PEFT's scaling divided out. What the adapter belongs to is
    noted in its configuration, where `save_pretrained` keeps it for `quailora check`. For example:

        model = get_peft_model(quantized, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        quailora.initialize(model, dataloader, weights="org/model", recipe="best")
        trainer = Trainer(model=model, ...)

    Args:
        peft_model: a `PeftModel` around a causal language model that is quantized (bitsandbytes in 4 or 8 bits, GPTQ,
            AWQ, HQQ, torchao in 8 bits), whose other layers keep their adapters; or around one in full precision.
        dataloader: batches as the model takes them. Padding is cut off, and tokens with the label -100 are run but do
            not count. Reading ends when 16 tokens for each input of the widest layer count, and after 131072 tokens at
            the latest; recipes that distil read all of these. `CalibrationTokens`, which hold sequences that have been
            cut and checked before, may be passed in place of batches, and are used as a whole.
        weights: the full-precision model: hub name, folder, or the model itself. By default what the model was loaded
            from. Read from disk block by block.
        recipe: name of a method, see `quailora list`; or a `Recipe`. Recipes that choose their own base, marked with *
            in that list, are refused: `quailora init` writes their base.
        adapter_name: name of the adapter.
        forward_fn: calls its first argument, the model, on its second, a batch; `model(**batch)` if None.
        prepare_model_inputs_fn: returns which tokens of a batch, its first argument, count: a mask, or pairs of row and
            column. Its second argument is the configuration of the adapter.
        callback: called with the model and the name of a layer whose factors were replaced; if what it returns is
            false, the former ones are put back.
        gather_distributed_inputs: whether the batches of all processes are used, or only those of the first one. All
            processes get the same factors.
        show_progress_bar: whether to show one where a person is watching.
        quantizer: how a model in full precision will be quantized; NF4 by default.
        frozen_rank: number of directions of each layer that are the correction and are not trained, see `freeze`. The
            others start as in plain LoRA. By default all directions are the correction, and all are trained; save such
            an adapter before its training, since converting, merging and moving it afterwards need its start.

    Returns:
        What `init` writes as `report.json`: errors of each layer, and what the run took; the same in every process.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    asked = Asked.of(peft_model, adapter_name, weights, recipe, quantizer, frozen_rank)
    reader = reader_for(peft_model, adapter_name, forward_fn, prepare_model_inputs_fn)
    if trained(asked.layers.values()):
        logger.warning(
            "The adapter %r does something already, as if it was trained: this is overwritten.", adapter_name
        )
    distributed.join(asked.device.type)  # and stay, for the trainer that comes
    with shown(show_progress_bar):
        tokens = all_tokens(dataloader, reader, asked.enough, gather=gather_distributed_inputs)
        return fit(asked, tokens, adapter_name, callback, frozen_rank)


def fit(
    asked: Asked,
    tokens: CalibrationTokens,
    adapter_name: str,
    callback: Callable[[Any, str], bool] | None = None,
    frozen_rank: int | None = None,
) -> dict[str, Any]:
    """Put the corrections that were asked for into an adapter; see `initialize`."""
    peft_model = asked.peft_model
    outcome = asked.outcome(tokens)
    if any(isinstance(layer, TunedLayer) for layer in asked.layers.values()):
        place_shared(peft_model, adapter_name, tuned_layers(peft_model, adapter_name))
    for name, correction in outcome.corrections.items():
        layer: Any = asked.layers[name]
        before = layer.kept()
        layer.accept(correction)
        if callback is not None and not callback(peft_model, name):
            layer.restore(before)
    if asked.method.family.name == "lora":  # without a frozen rank, what an earlier call has frozen is trained again
        freeze_layers(wrapped_layers(peft_model, adapter_name).values(), frozen_rank or 0)
    note_origin(peft_model, adapter_name, outcome.origin)
    return outcome.report


def reader_for(
    peft_model: Any, adapter: str, forward: Callable[[Any, Any], Any] | None, prepare: Callable[[Any, Any], Any] | None
) -> LoaderReader:
    """Return what takes tokens out of batches; where the configuration has settings for EVA, its labels count as there.

    Args:
        peft_model: the model.
        adapter: name of the adapter.
        forward: `forward_fn` of the caller.
        prepare: `prepare_model_inputs_fn` of the caller.
    """
    from peft import EvaConfig

    config = config_of(peft_model, adapter)
    settings = getattr(config, "eva_config", None) or EvaConfig()
    config = copy(config)  # which PEFT's own functions look into
    config.eva_config = settings
    ignored = settings.label_mask_value if settings.use_label_mask else None
    return LoaderReader(peft_model.get_base_model(), forward, prepare, config, ignored)


def note_origin(peft_model: Any, adapter: str, origin: Origin) -> None:
    """Note in the configuration of an adapter what it was made from, with the hash of its factors.

    PEFT overwrites the note while it saves an adapter without a task type, so one that has none becomes one for causal
    language models, which is what this is.
    """
    config = peft_model.peft_config[adapter]
    every, _, _ = adapter_of(peft_model, adapter)
    factors = {
        f"{PREFIX}{name}.{end}": tensor.detach()
        for name, layer in every.items()
        for end, tensor in tensors_of(layer).items()
    }
    # The hash is over the factors of all layers, those that were left alone among them, since training may change any.
    noted = noting_start(origin, factors)
    config.auto_mapping = {**(config.auto_mapping or {}), **noted.as_config()["auto_mapping"]}
    if config.task_type is None:
        config.task_type = _CAUSAL
