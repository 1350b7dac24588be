"""Several changes by LoRA in one adapter, whose rank is the sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.objective import Factors
from ..errors import ModelError
from .change import TrainedChange
from .convert_linear import is_plain_lora, linear_change
from .lora import LoraScaling
from .saved import A, B, SavedAdapter

Part = tuple[SavedAdapter, float]
"""An adapter, and the factor that it counts with."""


def adapter_of_change(changed: TrainedChange) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the configuration of an adapter for the full-precision model that adds a change.

    None if no adapter of the family does, or if modules were trained whole.
    """
    config = {**changed.trained.config, "auto_mapping": None, "init_lora_weights": True}
    if is_plain_lora(changed.trained):
        tensors, sizes = stacked(parts_of(changed, 1.0))
        return tensors, config | sizes
    if changed.family.linear and changed.earlier is None:
        if changed.before is None:
            return dict(changed.trained.tensors), config
        return linear_change(changed.trained, changed.before), {**changed.trained.config, "auto_mapping": None}
    return None


def parts_of(changed: TrainedChange, factor: float) -> list[Part]:
    """Return the adapters of which a change by LoRA is the sum, each with its factor."""
    parts: list[Part] = [(changed.trained, factor)]
    if changed.before is not None:
        parts.append((changed.before, -factor))
    if changed.earlier is not None:
        parts += parts_of(changed.earlier, factor)
    return parts


def stacked(parts: Sequence[Part]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an adapter by LoRA that adds a sum of adapters, and its ranks and alphas for PEFT.

    Its scaling is 1 in every layer: those of the parts are in its factors.

    Raises:
        ModelError: if adapters are of fused experts with other targets, which no single adapter holds.
    """
    first = parts[0][0]
    fused = {tuple(saved.config.get("target_parameters") or ()) for saved, _ in parts}
    if len(fused) > 1:
        raise ModelError("Expected adapters of the same fused experts, got others. Merge them one after the other.")
    # Adapters may have other layers than each other; a layer gets the directions of those that it is in.
    stems = sorted({stem for saved, _ in parts for stem in saved.stems})
    tensors: dict[str, Tensor] = {
        key: tensor
        for key, tensor in first.tensors.items()
        if not key.endswith((A, B))  # modules trained whole
    }
    ranks: dict[str, int] = {}
    for stem in stems:
        pairs = [scaled(saved, stem, factor) for saved, factor in parts if stem in saved.stems]
        tensors[stem + B], tensors[stem + A] = joined(pairs)
        ranks[first.layer(stem)] = sum(rank for _, rank in pairs)
    largest = max(ranks.values())
    own = {name: rank for name, rank in ranks.items() if rank != largest}
    scaling = LoraScaling(largest, rank_pattern=own, alpha_pattern={name: float(rank) for name, rank in own.items()})
    targets = sorted({name for saved, _ in parts for name in targets_of(saved)})
    return tensors, scaling.as_config() | {"target_modules": targets}


def scaled(saved: SavedAdapter, stem: str, factor: float) -> tuple[Factors, int]:
    """Return the factors of a layer with PEFT's scaling and another factor in `lora_B`, and its rank."""
    name, scaling = saved.layer(stem), saved.scaling
    lora_B, lora_A = saved.factors(stem)
    return Factors(factor * scaling.scale_of(name) * lora_B, lora_A), scaling.rank_of(name)


def joined(pairs: Sequence[tuple[Factors, int]]) -> Factors:
    """Return factors whose product is the sum of several, expert by expert where there are some.

    Args:
        pairs: factors, each with the rank of one expert.
    """
    # As in `convert.change`: dimension 1 of both views counts the rank of one expert.
    experts = len(pairs[0][0].lora_A) // pairs[0][1]
    lora_A = torch.cat([pair.lora_A.reshape(experts, rank, -1) for pair, rank in pairs], 1)
    lora_B = torch.cat([pair.lora_B.reshape(-1, rank, experts) for pair, rank in pairs], 1)
    return Factors(lora_B.flatten(1).contiguous(), lora_A.flatten(0, 1).contiguous())


def targets_of(saved: SavedAdapter) -> Sequence[str]:
    """Return the names of the modules that an adapter is in, by its tensors."""
    fused = saved.config.get("target_parameters") or ()
    return [name for name in map(saved.layer, saved.stems) if name not in fused]
