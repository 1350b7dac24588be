"""A `PeftModel` in memory: calibrate on its full-precision weights, and put corrections into its adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch

from ..adapters.lora import PREFIX
from ..adapters.provenance import Origin, digest_of
from ..adapters.wrapped import WrappedLayer, lora_config_of, scaling_of, trained, unwrapped, warn_of_rounding
from ..adapters.wrapped import wrapped_layers as layers_of
from ..bases.live import LiveBase
from ..calibration.loader import LoaderReader, all_tokens
from ..calibration.sources import BatchCalibration
from ..calibration.tokens import CalibrationTokens
from ..core.objective import Factors
from ..errors import ConfigurationError
from ..methods.method import Method
from ..methods.recipes import Recipe
from ..models.quantized import quantization_of
from ..quantizers import NF4, Quantizer
from ..support import distributed
from ..support.progress import shown
from .initialize_model import InitializedModel, carry_out
from .options import Resources
from .output import origin_of
from .plan import method_of, plan_run

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
) -> dict[str, Any]:
    """Let the LoRA adapter of a model in memory make up for the quantization of the model, before it is trained.

    Called between `get_peft_model` and the training. The full-precision model is run on the tokens block by block, and
    `lora_A` and `lora_B` are changed in place, with PEFT's scaling divided out. What the adapter belongs to is noted in
    its configuration, where `save_pretrained` keeps it for `quailora check`. For example:

        model = get_peft_model(quantized, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        quailora.initialize(model, dataloader, weights="org/model", recipe="best")
        trainer = Trainer(model=model, ...)

    Args:
        peft_model: a `PeftModel` around a causal language model that is quantized (bitsandbytes in 4 or 8 bits, GPTQ,
            AWQ, HQQ, torchao in 8 bits), whose other layers keep their adapters; or around one in full precision.
        dataloader: batches as the model takes them. Padding is cut off, and tokens with the label -100 are run but do
            not count. The first 131072 tokens are used. `CalibrationTokens`, which hold sequences that have been cut
            and checked before, may be passed in place of batches, and are used as a whole.
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

    Returns:
        What `init` writes as `report.json`: errors of each layer, and what the run took; the same in every process.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    asked = Asked.of(peft_model, adapter_name, weights, recipe, quantizer)
    reader = reader_for(peft_model, adapter_name, forward_fn, prepare_model_inputs_fn)
    distributed.join(asked.device.type)  # and stay, for the trainer that comes
    with shown(show_progress_bar):
        tokens = all_tokens(dataloader, reader, gather=gather_distributed_inputs)
        outcome = asked.outcome(tokens)
    for name, factors in outcome.factors.items():
        before = asked.layers[name].kept()
        asked.layers[name].correct(factors)
        if callback is not None and not callback(peft_model, name):
            asked.layers[name].restore(before)
    note_origin(peft_model, adapter_name, outcome.origin)
    return outcome.report


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run has found, the same in every process.

    Attributes:
        factors: correction of each layer, before PEFT's scaling.
        report: see `initialize`.
        origin: what the corrections were made from.
    """

    factors: dict[str, Factors]
    report: dict[str, Any]
    origin: Origin


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """What was asked for, checked before a batch is read.

    Attributes:
        peft_model: the model.
        layers: the layers to correct, by name.
        method: how.
        weights: hub name or folder of the full-precision model, or the model; None for the one in `peft_model`.
    """

    peft_model: Any
    layers: Mapping[str, WrappedLayer]
    method: Method
    weights: Any

    @classmethod
    def of(
        cls, peft_model: Any, adapter: str, weights: Any, recipe: Recipe | str, quantizer: Quantizer | None
    ) -> Asked:
        """Make out what was asked for; see `initialize`."""
        every = layers_of(peft_model, adapter)
        base = LiveBase(peft_model)
        layers = {name: layer for name, layer in every.items() if name in base.layers}
        if layers and quantizer is not None:
            raise ConfigurationError(
                f"Expected a quantizer for a model in full precision only, got {quantizer!r} for a model whose layers "
                "are quantized already. Leave quantizer out."
            )
        if layers and len(layers) < len(every):
            others = [name for name in every if name not in layers]
            logger.warning(
                "Adapters of %d layers stay as they are, since these layers are in full precision: %s.",
                len(others),
                ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
            )
        is_live, chosen = bool(layers), layers or every
        scaling = scaling_of(chosen, lora_config_of(peft_model, adapter))
        method = method_of(recipe, scaling, base if is_live else (quantizer or NF4()))
        if method.changes_base:
            raise ConfigurationError(
                f"The recipe {recipe!r} chooses a base of its own, but this model has one already. Take another one, "
                "such as quailora or best; quailora init writes the base with the adapter."
            )
        warn_of_rounding(chosen)
        if trained(chosen):
            logger.warning("The adapter %r does something already, as if it was trained: this is overwritten.", adapter)
        return cls(peft_model, chosen, method, weights_of(base, weights, is_live=is_live))

    @property
    def device(self) -> torch.device:
        """The device of the first layer."""
        return next(iter(self.layers.values())).parameters.lora_A.device

    def outcome(self, tokens: CalibrationTokens) -> Outcome:
        """Run the full-precision model on tokens, and return the correction of each layer in every process."""
        # Only the first process has the result of a run in memory. The others get factors, report and origin from it,
        # so that all start from the same numbers.
        with self.full_precision() as model:
            source, targets = BatchCalibration(tokens), list(self.layers)
            plan = plan_run(model, self.method, source, targets, None, self.resources, wrapped=True)
            result = carry_out(plan)
            outcome = outcome_of(result, self.method) if distributed.rank() == 0 else None
        first = distributed.from_first(outcome)
        if first is None:
            raise RuntimeError("the first process has no result")
        return first

    @contextmanager
    def full_precision(self) -> Iterator[Any]:
        """Yield what a run takes as the full-precision model, for a `with` statement."""
        if self.weights is not None:
            yield self.weights
            return
        with unwrapped(self.peft_model) as model:
            yield model

    @property
    def resources(self) -> Resources:
        """The device of the model; weights stay on disk, unless gradients of the whole model are needed."""
        trusted = type(self.peft_model.get_base_model()).__module__.startswith("transformers_modules.")
        return Resources(
            device="cuda" if self.device.type == "cuda" else "cpu",
            offload="auto" if self.method.needs_gradients else "always",
            trust_remote_code=trusted,
        )


def outcome_of(result: InitializedModel, method: Method) -> Outcome:
    """Return what the first process has found; nothing of it is memory-mapped."""
    output = result.output
    if output is None or result.report is None:
        raise RuntimeError("the first process has no result")
    corrections = result.corrections.items()
    factors = {name: Factors(*(factor.cpu() for factor in found.factors)) for name, found in corrections}
    base = {record.name: record.base for record in output.records if record.base is not None}
    return Outcome(factors, dict(result.report), origin_of(method, output.loaded.name, base))


def weights_of(base: LiveBase, given: Any, *, is_live: bool) -> Any:
    """Return where the full-precision weights are: a name, a folder, or a model; None for the model itself.

    Raises:
        ConfigurationError: if the model does not say.
    """
    if given is not None:
        return str(given) if isinstance(given, (str, PathLike)) else given
    if not is_live:
        return None
    if not base.place or quantization_of(base.place):
        where = f"was loaded quantized from {base.place!r}" if base.place else "does not say what it was loaded from"
        raise ConfigurationError(
            f"Expected the full-precision weights of the model, which {where}. Pass the hub name or the folder of the "
            "full-precision model as weights."
        )
    return str(Path(base.place)) if Path(base.place).is_dir() else base.place


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

    config = lora_config_of(peft_model, adapter)
    settings = config.eva_config or EvaConfig()
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
    every = layers_of(peft_model, adapter)
    factors = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer.parameters, part).detach()
        for name, layer in every.items()
        for part in ("lora_A", "lora_B")
    }
    # The hash is over the factors of all layers, those that were left alone among them, since training may change any.
    noted = replace(origin, initial=digest_of(factors))
    config.auto_mapping = {**(config.auto_mapping or {}), **noted.as_config()["auto_mapping"]}
    if config.task_type is None:
        config.task_type = _CAUSAL
