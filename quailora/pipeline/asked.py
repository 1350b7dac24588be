"""What is asked of a `PeftModel` in memory, checked, and the corrections that answer it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch

from ..adapters.frozen import check_frozen
from ..adapters.provenance import Origin
from ..adapters.tuned import AdaptedLayers, adapter_of, tensors_of
from ..adapters.wrapped import unwrapped, warn_of_rounding
from ..bases.live import LiveBase
from ..calibration.enough import Enough
from ..calibration.sources import BatchCalibration
from ..calibration.tokens import CalibrationTokens
from ..core.objective import Factors
from ..errors import ConfigurationError
from ..families import Correction
from ..families.lora import lora_correction
from ..methods.method import Method
from ..methods.recipes import Recipe
from ..models.quantized import quantization_of
from ..quantizers import NF4, Quantizer
from ..support import distributed
from .initialize_model import InitializedModel, carry_out
from .options import Resources
from .output import origin_of
from .plan import method_of, plan_run

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run has found, the same in every process.

    Attributes:
        corrections: correction of each layer, before PEFT's scaling.
        report: see `initialize`.
        origin: what the corrections were made from.
    """

    corrections: dict[str, Correction]
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
    layers: AdaptedLayers
    method: Method
    weights: Any

    @classmethod
    def of(
        cls,
        peft_model: Any,
        adapter: str,
        weights: Any,
        recipe: Recipe | str,
        quantizer: Quantizer | None,
        frozen_rank: int | None = None,
    ) -> Asked:
        """Make out what was asked for; see `initialize`."""
        every, scaling, family = adapter_of(peft_model, adapter)
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
        if frozen_rank is not None:
            check_frozen(frozen_rank, {name: layer.rank for name, layer in chosen.items()}, smallest=1)
        method = method_of(recipe, scaling, base if is_live else (quantizer or NF4()), family)
        method = replace(method, frozen_rank=frozen_rank)
        if method.changes_base:
            raise ConfigurationError(
                f"The recipe {recipe!r} chooses a base of its own, but this model has one already. Take another one, "
                "such as quailora or best; quailora init writes the base with the adapter."
            )
        warn_of_rounding(tensor for layer in chosen.values() for tensor in tensors_of(layer).values())
        return cls(peft_model, chosen, method, weights_of(base, weights, is_live=is_live))

    @property
    def device(self) -> torch.device:
        """The device of the first layer."""
        return next(iter(self.layers.values())).device

    @property
    def enough(self) -> Enough:
        """When a data loader has given enough tokens."""
        widest = max(layer.shape[1] for layer in self.layers.values())
        return Enough.of(widest, distilled=self.method.is_trained)

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
    corrections = {name: correction.to("cpu") for name, correction in result.corrections.items()}
    if method.frozen_rank is not None:
        # Fresh directions are those that PEFT has drawn; those that are drawn for a file are cut off again.
        kept = method.frozen_rank
        for name, correction in corrections.items():
            lora_B, lora_A = correction.factors
            corrections[name] = lora_correction(Factors(lora_B[:, :kept], lora_A[:kept]))
    base = {record.name: record.base for record in output.records if record.base is not None}
    return Outcome(corrections, dict(result.report), origin_of(method, output.loaded.name, base))


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
