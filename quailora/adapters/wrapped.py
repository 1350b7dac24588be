"""The LoRA layers of a `PeftModel` in memory: which there are, how PEFT scales them, and new factors for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.objective import Factors
from ..errors import ArgumentTypeError, ConfigurationError, NumericalWarning, TargetError
from ..families import Correction
from .lora import LoraScaling, divided

CHANGED_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Beginnings of PEFT's `init_lora_weights` that take the start of the adapter out of the weights of the base."""


@final
@dataclass(frozen=True, eq=False)
class WrappedLayer:
    """A linear layer with a LoRA adapter, as PEFT has put it into a model.

    Attributes:
        name: name of the layer in the model without an adapter.
        module: PEFT's layer around it.
        adapter: name of the adapter.
    """

    name: str
    module: Any
    adapter: str

    @property
    def base(self) -> nn.Module:
        """The layer inside, quantized or not."""
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def rank(self) -> int:
        """Rank of the adapter in this layer."""
        return int(self.module.r[self.adapter])

    @property
    def scale(self) -> float:
        """What PEFT multiplies `lora_B @ lora_A` with, patterns and rank-stabilised scaling included."""
        return float(self.module.scaling[self.adapter])

    @property
    def alpha(self) -> float:
        """`lora_alpha` of this layer."""
        return float(self.module.lora_alpha[self.adapter])

    @property
    def parameters(self) -> Factors:
        """The trainable factors themselves, `lora_B` of shape (out_features, rank), `lora_A` (rank, in_features)."""
        return Factors(self.module.lora_B[self.adapter].weight, self.module.lora_A[self.adapter].weight)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` by the factors, which also packed layers have."""
        lora_B, lora_A = self.parameters
        return len(lora_B), lora_A.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the adapter."""
        return self.parameters.lora_A.device

    def materialize(self) -> None:
        """Give factors that have no data yet, as with PEFT's `low_cpu_mem_usage`, some beside the layer inside."""
        if self.parameters.lora_A.is_meta:
            tensors = (*self.base.parameters(), *self.base.buffers())
            device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
            for factors in (self.module.lora_A, self.module.lora_B):
                factors[self.adapter].to_empty(device=device)
            self.restore(Factors(*(torch.zeros_like(factor) for factor in self.parameters)))

    @torch.no_grad()
    def kept(self) -> Factors:
        """Return a copy of the factors, to go back to."""
        return Factors(*(factor.detach().clone() for factor in self.parameters))

    @torch.no_grad()
    def restore(self, factors: Factors) -> None:
        """Put factors in place of those that are there, as PEFT stores them.

        The parameters stay the same objects with the same shapes, dtypes and devices, so that an optimizer that holds
        them already goes on with the new values.
        """
        # In place: an optimizer, a tied parameter or a wrapper for several processes keeps the object that it holds.
        for parameter, factor in zip(self.parameters, factors, strict=True):
            parameter.copy_(factor)

    def accept(self, correction: Correction) -> None:
        """Let the adapter add a correction of its rank or a lower one; PEFT's fresh directions fill up the rest."""
        frozen = divided(correction.factors, self.scale)
        self.restore(followed(frozen, self.kept().lora_A[len(frozen.lora_A) :]))


def wrapped_layers(model: Any, adapter: str) -> dict[str, WrappedLayer]:
    """Return every linear layer of a model that has a LoRA adapter, in the order of the model.

    Args:
        model: a `PeftModel`.
        adapter: name of the adapter.

    Raises:
        ArgumentTypeError: if the model is no `PeftModel`.
        ConfigurationError: if it has no such adapter, one that is not LoRA, or one that PEFT has merged into its base,
            has taken out of its base, or applies in another way than `W x + s * lora_B @ lora_A x`.
        TargetError: if the adapter is in fused parameters, or in no linear layer.
    """
    from peft.tuners.lora import LoraLayer

    config = lora_config_of(model, adapter)
    plain = model.get_base_model()
    found, others = {}, []
    for name, module in plain.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter not in module.lora_A:
            others += [name] * (adapter in module.lora_embedding_A)
            continue
        layer = WrappedLayer(name, module, adapter)
        check_plain(layer)
        if module.lora_A[adapter].weight.ndim != 2 or hasattr(module, "parameter_name"):
            raise TargetError(
                f"Expected an adapter of linear layers, got one in {name}, which is a convolution or a fused parameter "
                "of experts. Leave it out of target_modules and target_parameters."
            )
        layer.materialize()
        found[name] = layer
    if not found:
        raise TargetError(
            f"Expected linear layers with the adapter {adapter!r}, and there are none. Its target_modules are "
            f"{config.target_modules}."
        )
    if others:
        warnings.warn(f"Adapters of embeddings stay as they are: {', '.join(others)}.", NumericalWarning, stacklevel=3)
    return found


def config_of(model: Any, adapter: str) -> Any:
    """Return PEFT's configuration of an adapter; raises as `wrapped_layers` and `tuned_layers` do."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ArgumentTypeError(
            f"Expected a PeftModel, got {type(model).__name__}. Put the adapter into the model first: "
            "peft.get_peft_model(model, LoraConfig(...))."
        )
    if adapter not in model.peft_config:
        raise ConfigurationError(
            f"Expected the name of an adapter of this model, got {adapter!r}. It has {', '.join(model.peft_config)}."
        )
    return model.peft_config[adapter]


def lora_config_of(model: Any, adapter: str) -> Any:
    """Return PEFT's configuration of a LoRA adapter; raises as `wrapped_layers` does."""
    from peft import LoraConfig

    config = config_of(model, adapter)
    if not isinstance(config, LoraConfig):
        raise ConfigurationError(
            f"Expected a LoRA adapter, got {adapter!r} of the type {getattr(config, 'peft_type', type(config))}."
        )
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGED_THE_BASE):
        raise ConfigurationError(
            f"Expected an adapter that leaves the weights of its base as they are, got init_lora_weights={start!r}, "
            "which has changed them. Make the adapter with init_lora_weights=True."
        )
    return config


def check_plain(layer: WrappedLayer) -> None:
    """Raise a `ConfigurationError` unless a layer computes `W x + s * lora_B @ lora_A x` with factors of its own."""
    module, adapter = layer.module, layer.adapter
    variant = module.lora_variant.get(adapter)
    if variant is not None:
        raise ConfigurationError(
            f"Expected plain LoRA in {layer.name}, got {type(variant).__name__}, in which a correction of the base "
            "would not be a correction of the output. Make the adapter without it, such as with use_dora=False."
        )
    if module.merged:
        raise ConfigurationError(
            f"Expected adapters beside the weights, but {', '.join(module.merged_adapters)} is merged into "
            f"{layer.name}. Call unmerge_adapter() first."
        )
    for factor in layer.parameters:
        if factor.numel() == 0:
            raise ConfigurationError(
                f"Expected the factors of {layer.name} whole, got some that are split over processes. Initialize the "
                "adapter before the trainer prepares the model for sharding."
            )


def warn_of_rounding(parameters: Iterable[Tensor]) -> None:
    """Warn if the factors are to be kept in 16 bits, in which their rounding alone can be a visible error."""
    kinds = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    rough = sorted(str(kind).removeprefix("torch.") for kind in kinds if torch.finfo(kind).bits < 32)
    if rough:
        warnings.warn(
            f"The factors of this adapter are {' and '.join(rough)}, whose rounding takes away a part of the "
            "correction. PEFT makes them float32 unless autocast_adapter_dtype=False.",
            NumericalWarning,
            stacklevel=3,
        )


def trained(layers: Iterable[Any]) -> list[str]:
    """Return the names of the layers with LoRA whose adapter does something already: their `lora_B` is not zero."""
    return [layer.name for layer in layers if isinstance(layer, WrappedLayer) and bool(_any(layer.parameters.lora_B))]


def _any(factor: Tensor) -> Tensor:
    return factor.detach().ne(0).any()


def scaling_of(layers: Mapping[str, WrappedLayer], config: Any) -> LoraScaling:
    """Return the ranks and alphas that layers have, in the words of their configuration where these are still true.

    Args:
        layers: layers of one adapter.
        config: PEFT's configuration of it.

    Raises:
        ConfigurationError: if a factor is not positive, or far from any in use.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    stated = LoraScaling(
        config.r, float(config.lora_alpha), bool(config.use_rslora), ranks, {key: float(alphas[key]) for key in alphas}
    )
    unused = set(stated.unused_patterns(layers))
    stated = replace(
        stated,
        rank_pattern={key: rank for key, rank in ranks.items() if key not in unused},
        alpha_pattern={key: alpha for key, alpha in stated.alpha_pattern.items() if key not in unused},
    )
    found = {name: (layer.rank, layer.scale) for name, layer in layers.items()}
    if all((stated.rank_of(name), stated.scale_of(name)) == own for name, own in found.items()):
        return stated
    return LoraScaling(  # somebody has changed the layers since they were made
        stated.rank,
        stated.alpha,
        stated.rslora,
        {name: rank for name, (rank, _) in found.items()},
        {name: stated.alpha_for(rank, scale) for name, (rank, scale) in found.items()},
    )


def followed(factors: Factors, fresh: Tensor) -> Factors:
    """Return factors with further rows of `lora_A`, whose columns of `lora_B` are zero.

    Args:
        factors: the factors.
        fresh: further rows, (number, in).
    """
    zeros = factors.lora_B.new_zeros(len(factors.lora_B), len(fresh))
    return Factors(torch.cat([factors.lora_B, zeros], 1), torch.cat([factors.lora_A, fresh.to(factors.lora_A)]))


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """Yield the model inside a `PeftModel` with its own layers in the places of PEFT's, for a `with` statement.

    Args:
        model: a `PeftModel`, which is whole again afterwards.
    """
    plain = model.get_base_model()
    replaced: dict[str, nn.Module] = {}
    try:
        for name, module in list(plain.named_modules(remove_duplicate=False)):
            inner = inner_of(module)
            if inner is not None and not any(name.startswith(f"{outer}.") for outer in replaced):
                plain.set_submodule(name, inner)
                replaced[name] = module
        yield plain
    finally:
        for name, module in replaced.items():
            plain.set_submodule(name, module)


def inner_of(module: Any) -> nn.Module | None:
    """Return the layer that a layer of PEFT stands for in the model without adapters; None for all other modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        inner: nn.Module = module.original_module
        return inner
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
