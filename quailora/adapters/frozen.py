"""Directions of a LoRA adapter that training leaves as they are, beside fresh ones that it changes."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..families import Correction
from ..families.lora import lora_correction
from .lora import LoraScaling
from .wrapped import WrappedLayer, followed, wrapped_layers

_HANDLES = "_quailora_frozen"
_CHANGES = 2  # so many may come from loading checkpoints


def freeze(peft_model: Any, rank: int, adapter_name: str = "default") -> None:
    """Let training leave the first directions of an adapter as they are: rows of `lora_A`, columns of `lora_B`.

    The adapter stays an ordinary LoRA adapter. Gradients of its first directions are zero from now on, so that
    optimizers do not move them. Weight decay would: leave it at 0, which is the default of transformers' trainer. The
    training stops with a `ConfigurationError` where these directions change from step to step all the same. Hooks are
    not saved. After a model is loaded to go on with its training, freeze it again.

    Args:
        peft_model: a `PeftModel`.
        rank: number of directions to freeze in every layer; 0 trains all directions again.
        adapter_name: name of the adapter.

    Raises:
        ArgumentTypeError: if the model is no `PeftModel`.
        ConfigurationError: if a layer has no direction left to train.
    """
    layers = wrapped_layers(peft_model, adapter_name)
    check_frozen(rank, {name: layer.rank for name, layer in layers.items()})
    freeze_layers(layers.values(), rank)


def freeze_layers(layers: Iterable[WrappedLayer], rank: int) -> None:
    """Let training leave the first directions of layers as they are; see `freeze`."""
    watch = True  # of all layers, since what moves one moves all
    for layer in layers:
        for parameter, dimension in zip(layer.parameters, (1, 0), strict=True):
            for handle in getattr(parameter, _HANDLES, ()):
                handle.remove()
            handles = []
            if rank and parameter.requires_grad:
                handles.append(parameter.register_hook(without(rank, dimension)))  # type: ignore[no-untyped-call] # torch
            if handles and watch and dimension == 0:  # of lora_A
                handles.append(parameter.register_hook(Watch(parameter, rank)))  # type: ignore[no-untyped-call] # torch
                watch = False
            setattr(parameter, _HANDLES, handles)


def check_none_frozen(layers: Iterable[WrappedLayer], what: str) -> None:
    """Raise a `ConfigurationError` if directions of an adapter are frozen.

    Args:
        layers: the layers of the adapter.
        what: what would fit all directions again.
    """
    if any(getattr(parameter, _HANDLES, ()) for layer in layers for parameter in layer.parameters):
        raise ConfigurationError(
            f"{what} fits all directions of an adapter again, and the first ones of this adapter are frozen. Leave it "
            "out, or let all directions be trained before, by `quailora.freeze(model, 0)`."
        )


def check_frozen(rank: int, ranks: Mapping[str, int], smallest: int = 0) -> None:
    """Raise a `ConfigurationError` unless each layer has directions beside the frozen ones.

    Args:
        rank: number of directions to freeze.
        ranks: rank of the adapter of each layer.
        smallest: least number of directions that may be frozen.
    """
    name, least = min(ranks.items(), key=lambda pair: pair[1])
    if not smallest <= rank < least:
        raise ConfigurationError(
            f"Expected to freeze at least {smallest} and fewer directions than a layer has, got {rank}, and {name} "
            f"has {least}. Make the adapter with a larger rank, such as 32 for 16 frozen and 16 trained directions."
        )


def without(rank: int, dimension: int) -> Callable[[Tensor], Tensor]:
    """Return a hook that sets the first entries of a gradient along a dimension to zero."""

    def hook(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept.narrow(dimension, 0, rank).zero_()
        return kept

    return hook


class Watch:
    """Hook that stops a training which moves frozen rows of `lora_A`.

    Weight decay changes them at every step. Loading a checkpoint changes them once, which is fine.

    Args:
        parameter: `lora_A` of a layer, (rank, in).
        rank: how many of its rows are frozen.
    """

    def __init__(self, parameter: Tensor, rank: int) -> None:
        self._parameter, self._rank = weakref.ref(parameter), rank
        self._seen: Tensor | None = None
        self._changes = 0

    def __call__(self, _: Tensor) -> None:
        """Look at a frozen row.

        Raises:
            ConfigurationError: if it has changed several times.
        """
        parameter = self._parameter()
        if parameter is None:
            return
        row = parameter.detach()[0].clone()
        if self._seen is not None and not torch.equal(row, self._seen):
            self._changes += 1
        if self._changes > _CHANGES:
            raise ConfigurationError(
                f"The first {self._rank} directions of the adapter are frozen, but the training changes them at every "
                "step, as weight decay does. Set weight_decay=0, and begin again with the adapter as it was."
            )
        self._seen = row


def with_fresh(name: str, correction: Correction, scaling: LoraScaling, seed: int) -> Correction:
    """Return a correction with directions after its own that start as in plain LoRA, up to the rank of its layer.

    Their rows of `lora_A` are drawn as PEFT draws them, uniform between `-1 / sqrt(in)` and `1 / sqrt(in)`, and their
    columns of `lora_B` are zero, so that the product stays the same.

    Args:
        name: name of the layer, which is a part of the seed.
        correction: the correction before PEFT's scaling.
        scaling: rank of the layer.
        seed: seed of the draw.
    """
    lora_A = correction.factors.lora_A
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"fresh {name}".encode()))
    bound = lora_A.shape[1] ** -0.5
    size = (scaling.rank_of(name) - len(lora_A), lora_A.shape[1])
    joined = followed(correction.factors, torch.empty(size).uniform_(-bound, bound, generator=generator))
    energies = correction.energies
    if energies is not None:
        energies = torch.cat([energies, energies.new_zeros(size[0])])
    return lora_correction(joined, energies)
