"""The layers of a `PeftModel` in memory that have an adapter of any family, and new parameters for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, TargetError
from ..families import FAMILIES, REFUSED, Correction, Family
from .lora import LoraScaling
from .wrapped import WrappedLayer, config_of, lora_config_of, scaling_of, wrapped_layers

_MARKS: dict[str, Any] = {"r": 7919, "lora_alpha": 7907, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
"""Sizes that are found again in the configuration of a family, by which the names of its fields are known."""

_PATTERNS = ("rank_pattern", "alpha_pattern")


@final
@dataclass(frozen=True, eq=False)
class TunedLayer:
    """A linear layer with an adapter, as PEFT has put it into a model.

    Attributes:
        name: name of the layer in the model without an adapter.
        module: PEFT's layer around it.
        adapter: name of the adapter.
        family: its family.
        rank: its size.
        scale: what PEFT multiplies the change by.
    """

    name: str
    module: Any
    adapter: str
    family: Family
    rank: int
    scale: float

    @property
    def base(self) -> nn.Module:
        """The layer inside, quantized or not."""
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, which packed layers know, too."""
        base: Any = self.base
        return int(base.out_features), int(base.in_features)

    @property
    def device(self) -> torch.device:
        """The device of the adapter."""
        return next(iter(self.parameters.values())).device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tensors of the adapter themselves, by the ends of their names in PEFT's files."""
        return {end: self._tensor(end) for end in self.family.shapes(self.shape, self.rank)}

    def _tensor(self, end: str) -> Tensor:
        first, *rest = end.split(".")
        part = getattr(self.module, first)[self.adapter]
        for name in rest or (["weight"] if isinstance(part, nn.Module) else []):
            part = getattr(part, name)
        found: Tensor = part
        return found

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        """Return a copy of the tensors, to go back to."""
        return {end: tensor.detach().clone() for end, tensor in self.parameters.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place of those that are there, as PEFT stores them; the parameters stay the same objects."""
        for end, parameter in self.parameters.items():
            parameter.copy_(tensors[end])

    def accept(self, correction: Correction) -> None:
        """Let the adapter change the output of the layer as a correction says."""
        self.restore(self.family.stored(correction.parameters, self.scale))


def tuned_layers(model: Any, adapter: str) -> dict[str, TunedLayer]:
    """Return every linear layer of a model that has an adapter of some family, in the order of the model.

    Args:
        model: a `PeftModel`.
        adapter: name of the adapter.

    Raises:
        ArgumentTypeError: if the model is no `PeftModel`.
        ConfigurationError: if it has no such adapter, one that has no start here, or one that is merged.
        TargetError: if the adapter is in no linear layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    family, scaling = family_of(checked_config(model, adapter))
    found: dict[str, TunedLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module.get_base_layer(), "out_features"):
            continue
        layer = TunedLayer(name, module, adapter, family, scaling.rank_of(name), scaling.scale_of(name, family))
        first = next(iter(family.shapes(layer.shape, layer.rank))).partition(".")[0]
        if adapter not in getattr(module, first, ()):
            continue
        if module.merged:
            raise ConfigurationError(
                f"Expected adapters beside the weights, but {', '.join(module.merged_adapters)} is merged into {name}. "
                "Call unmerge_adapter() first."
            )
        found[name] = layer
    if not found:
        raise TargetError(f"Expected linear layers with the adapter {adapter!r}, and there are none.")
    return found


def checked_config(model: Any, adapter: str) -> Any:
    """Return PEFT's configuration of an adapter; raises as `lora_config_of` does for LoRA and what is made of it."""
    from peft import LoraConfig

    config = config_of(model, adapter)
    return lora_config_of(model, adapter) if isinstance(config, LoraConfig) else config


def family_of(config: Any) -> tuple[Family, LoraScaling]:
    """Return the family that a configuration of PEFT describes, its ranks and alphas.

    A family of quailora is meant if its own configuration says the same as this one in everything that it says.
    Families of other packages are not looked at, since they may say less than what makes an adapter theirs.

    Raises:
        ConfigurationError: if there is none; the message says why.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    differences: list[str] = []
    for cls in FAMILIES.values():
        if cls.peft_type != kind:
            continue
        own = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}  # type: ignore[arg-type] # a dataclass
        family = cls(**own)
        written = family.config(_MARKS)
        names = {value: name for name, value in written.items() if isinstance(value, int) and value > 1}
        rank = int(getattr(config, names[_MARKS["r"]])) if _MARKS["r"] in names else 0
        alpha = float(getattr(config, names[_MARKS["lora_alpha"]])) if _MARKS["lora_alpha"] in names else None
        ranks, alphas = (getattr(config, name) or {} if family.has_patterns else {} for name in _PATTERNS)
        scaling = LoraScaling(
            rank or family.default_rank or LoraScaling().rank,
            alpha,
            family.has_rslora and bool(config.use_rslora),
            dict(ranks),
            {key: float(value) for key, value in alphas.items()},
        )
        other = {
            name: (value, getattr(config, name, None))
            for name, value in family.config(scaling.as_config()).items()
            if name not in family.start_fields and (value or None) != (getattr(config, name, None) or None)
        }
        if not other:
            return family, scaling
        name, (value, given) = next(iter(other.items()))
        differences.append(f"{cls.name or cls.__name__} has {name}={value!r} and this adapter {given!r}")
    reason = "; ".join(differences) or REFUSED.get(kind.lower(), "PEFT's method is not known here")
    raise ConfigurationError(f"There is no start for this adapter of the type {kind}: {reason}.")


def place_shared(model: Any, adapter: str, layers: Mapping[str, TunedLayer]) -> None:
    """Put the tensors that all layers of a family share into a model, where PEFT keeps them.

    Args:
        model: a `PeftModel`.
        adapter: name of the adapter.
        layers: all layers of the adapter.

    Raises:
        ConfigurationError: if they have other shapes there.
    """
    first = next(iter(layers.values()))
    for name, tensor in first.family.shared({name: layer.shape for name, layer in layers.items()}, first.rank).items():
        there: Tensor = getattr(model.base_model, name.rpartition(".")[2])[adapter]
        if there.shape != tensor.shape:
            raise ConfigurationError(
                f"Expected {name} of the shape {tuple(tensor.shape)} in the model, got {tuple(there.shape)}."
            )
        there.data.copy_(tensor)


AdaptedLayers = Mapping[str, WrappedLayer | TunedLayer]
"""Layers of an adapter by name: of LoRA, or of another family."""


def tensors_of(layer: WrappedLayer | TunedLayer) -> dict[str, Tensor]:
    """Return the tensors of the adapter of a layer by the ends of their names in PEFT's files."""
    if isinstance(layer, TunedLayer):
        return layer.parameters
    return {"lora_A.weight": layer.parameters.lora_A, "lora_B.weight": layer.parameters.lora_B}


def adapter_of(peft_model: Any, adapter: str) -> tuple[AdaptedLayers, LoraScaling, Family | None]:
    """Return the layers of an adapter, their ranks and alphas, and the family, which is None for LoRA.

    Raises:
        QuailoraError: if the adapter is merged, of a family that has no start here, or in no linear layer.
    """
    config = checked_config(peft_model, adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "LORA" and not (config.use_dora or config.lora_bias):
        layers = wrapped_layers(peft_model, adapter)
        return {**layers}, scaling_of(layers, lora_config_of(peft_model, adapter)), None
    family, scaling = family_of(config)
    return {**tuned_layers(peft_model, adapter)}, scaling, family
