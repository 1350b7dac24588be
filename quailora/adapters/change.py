"""What training has changed in the weights of a model, layer by layer, for adapters of any family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigurationError, ModelError, named
from ..families import Family, Lora
from ..families.adapter import Parameters
from ..models.layers import Layer
from ..support.files import StrPath
from .convert_linear import is_plain_lora
from .given import AdapterGiven, given_folder
from .lora import PREFIX, ExpertStack, LoraScaling, expert_stacks
from .pairs import adapter_keys, check_trained_from, initial_of
from .provenance import digest_of, read_provenance
from .saved import SavedAdapter
from .tuned import family_of

EARLIER = "change"
"""Folder in an adapter that `rebase` has written: the change of the earlier training alone."""


@final
@dataclass(frozen=True, eq=False)
class TrainedChange:
    """The change that a training has made: what the trained adapter does to each weight, less what its start did.

    For LoRA it is `s (B A - B0 A0)`. For families that multiply the quantized weight `Q`, such as DoRA, it is the
    difference of both effective weights on `Q`.

    Attributes:
        trained: the adapter after training.
        before: the adapter before training; None if it added nothing.
        family: the kind of both.
        scaling: their ranks and alphas.
        earlier: the change of an earlier training that the start holds, if any.
    """

    trained: SavedAdapter
    before: SavedAdapter | None
    family: Family
    scaling: LoraScaling
    earlier: TrainedChange | None = None

    @classmethod
    def read(cls, adapter: AdapterGiven, initial: StrPath | None = None) -> TrainedChange:
        """Read an adapter and its start from their folders.

        Args:
            adapter: hub name or folder of the trained adapter, or the `PeftModel` that was trained.
            initial: hub name or folder of the adapter that its training started from; "zero" if it added nothing; None
                looks for it, see `initial_of`.

        Raises:
            ConfigurationError: if training did not start there, as far as the files tell, or has changed nothing.
            ModelError: if a file is missing or damaged, or the adapter is of a family whose change is no weight.
        """
        trained = SavedAdapter.read(given_folder(adapter))
        trained.check_every_token()
        family, scaling = family_of_saved(trained)
        before = initial_of(trained, initial)
        if before is not None:
            check_trained_from(family, trained, before)
        change = cls(trained, before, family, scaling, earlier_change(before))
        if before is not None and change.earlier is None and digest_of(trained.tensors) == digest_of(before.tensors):
            raise ConfigurationError(
                f"{trained.folder} holds the same tensors as {before.folder}: training has changed nothing, so the "
                "result would be the model as it was. Pass the adapter that was trained."
            )
        return change

    @cached_property
    def digest(self) -> str:
        """A short hash of the tensors of all adapters that the change is made of."""
        before = {} if self.before is None else self.before.tensors
        start = {f"start {key}": tensor for key, tensor in before.items()}
        return digest_of({**self.trained.tensors, **start}) + ("" if self.earlier is None else self.earlier.digest)

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the quantized weight that the adapter was trained on."""
        return self.family.needs_base

    @cached_property
    def modules(self) -> dict[str, Tensor]:
        """Weights of the modules that were trained whole, by their names in the model."""
        own = {*adapter_keys(self.trained)}
        return {key.removeprefix(PREFIX): tensor for key, tensor in self.trained.tensors.items() if key not in own}

    def layers(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return the layers of a model that the adapter changes.

        Raises:
            ConfigurationError: if the adapter has tensors for layers that the model does not have, or of other shapes.
        """
        # Every tensor of the adapter has to find its layer: one that is left over is a change that would be lost.
        chosen = {name: layer for name, layer in layers.items() if self._has(layer)}
        known = {*self._parameters(self.trained, chosen).keys}
        shapes = {name: layer.shape for name, layer in chosen.items()}
        shared = {key.rpartition(".")[2] for key in self.family.shared(shapes, self.scaling.rank)} if chosen else set()
        known |= {key for key in self._own if key.rpartition(".")[2] in shared}  # PEFT repeats them in every layer
        unknown = [key for key in self._own if key.startswith(PREFIX) and key not in known]
        if unknown or not chosen:
            raise ConfigurationError(
                f"Expected the adapter {self.trained.folder} to fit the model, which has no layer for "
                f"{unknown[0] if unknown else 'any of its tensors'}. It is the adapter of another model."
            )
        check_shared(self.trained, self.family, self.scaling, chosen)
        if self.family.moves_bias:
            for name, layer in chosen.items():
                if getattr(layer.module, "bias", None) is not None:
                    raise ConfigurationError(
                        f"The adapter {self.family.title} also changes the bias of {name}, which cannot be merged here."
                    )
        return chosen

    def _has(self, layer: Layer) -> bool:
        if is_plain_lora(self.trained):
            return self.trained.corrects(layer.name)
        return layer.expert is None and any(key.startswith(f"{PREFIX}{layer.name}.") for key in self._own)

    @cached_property
    def _own(self) -> tuple[str, ...]:
        return tuple(adapter_keys(self.trained))

    def of(
        self, layer: Layer, layers: Mapping[str, Layer], base: Tensor | None = None
    ) -> Float[Tensor, "out_features in_features"]:
        """Return the change of one layer, in float32 at least, on the CPU.

        Args:
            layer: the layer.
            layers: all layers that the adapter changes; see `layers`.
            base: the quantized weight that it was trained on, for families that need it.
        """
        with named(layer.name):
            # Families that do not multiply the base read its shape at most.
            shape = torch.empty(layer.shape) if base is None else base.float().cpu()
            after = self._effective(self.trained, layer, layers, shape)
            if self.before is not None:
                after = after - self._effective(self.before, layer, layers, shape)
            if self.earlier is not None and self.earlier._has(layer):  # noqa: SLF001 # of the same class
                after = after + self.earlier.of(layer, layers)
        return after

    def effective(
        self, layer: Layer, layers: Mapping[str, Layer], base: Tensor
    ) -> Float[Tensor, "out_features in_features"]:
        """Return the weight that the trained adapter makes of the quantized one: what the unmerged layer computes."""
        return base.float().cpu() + self._effective(self.trained, layer, layers, base.float().cpu())

    def _effective(self, saved: SavedAdapter, layer: Layer, layers: Mapping[str, Layer], base: Tensor) -> Tensor:
        stored = self._parameters(saved, layers).of(layer)
        if not stored:
            return torch.zeros(layer.shape)
        # What is stored has PEFT's scaling divided out, and dividing by its inverse brings it back.
        scale = self.scaling.scale_of(layer.group, self.family)
        return self.family.change(self.family.stored(stored, 1 / scale), base).weight.float()

    def _parameters(self, saved: SavedAdapter, layers: Mapping[str, Layer]) -> SavedParameters:
        # Kept for the next layer: a model with experts has thousands of them, and each asks for all of its kind.
        kept = self._sorted.get(saved)
        if kept is None or kept.layers is not layers:
            kept = self._sorted[saved] = SavedParameters(saved, self.family, self.scaling, layers)
        return kept

    @cached_property
    def _sorted(self) -> dict[SavedAdapter, SavedParameters]:
        return {}


@final
@dataclass(frozen=True, eq=False)
class SavedParameters:
    """The tensors of an adapter file, sorted by layers.

    Attributes:
        saved: the adapter.
        family: its family.
        scaling: its ranks and alphas.
        layers: the layers of the model that it has tensors for.
    """

    saved: SavedAdapter
    family: Family
    scaling: LoraScaling
    layers: Mapping[str, Layer]

    @property
    def keys(self) -> list[str]:
        """Names of all tensors in the file that belong to the layers."""
        stacks = expert_stacks(self.layers)
        found = [f"{stack.place}.{end}" for stack in stacks for end in ("lora_A.weight", "lora_B.weight")]
        return found + [
            f"{PREFIX}{name}.{end}"
            for name, layer in self.layers.items()
            if layer.expert is None
            for end in self._ends(layer)
        ]

    @cached_property
    def _stack_of(self) -> dict[str, ExpertStack]:
        return {name: stack for stack in expert_stacks(self.layers) for name in stack.members}

    def of(self, layer: Layer) -> Parameters:
        """Return the tensors of a layer; none if AdaLoRA has cut all of its directions off."""
        if layer.expert is not None:
            lora_B, lora_A = self._stack_of[layer.name].factors(self.saved.tensors)[layer.name]
            return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}
        found = {end: self.saved.tensors[f"{PREFIX}{layer.name}.{end}"] for end in self._ends(layer)}
        found = {end: tensor.float() if tensor.is_floating_point() else tensor for end, tensor in found.items()}
        return {} if any(tensor.numel() == 0 for tensor in found.values()) else found

    def _ends(self, layer: Layer) -> list[str]:
        rank = self.scaling.rank_of(layer.group)
        shapes = self.family.shapes(layer.shape, rank)
        for end, shape in shapes.items():
            key = f"{PREFIX}{layer.name}.{end}"
            tensor = self.saved.tensors.get(key)
            fits = tensor is not None and (tuple(tensor.shape) == shape or self.family.name == "adalora")
            if not fits:
                came = "none" if tensor is None else f"one of {tuple(tensor.shape)}"
                raise ConfigurationError(
                    f"Expected a tensor {key} of the shape {shape} in {self.saved.folder}, got {came}. It is the "
                    "adapter of another model, or its configuration is that of another adapter."
                )
        return list(shapes)


def family_of_saved(saved: SavedAdapter) -> tuple[Family, LoraScaling]:
    """Return the family of a saved adapter, with its ranks and alphas.

    Raises:
        ModelError: if its change is not one of weights alone, or it is of a kind that is not known here.
    """
    from peft import PeftConfig

    if is_plain_lora(saved):
        saved.check_plain()
        family: Family = Lora()
        scaling = saved.scaling
    else:
        try:
            family, scaling = family_of(PeftConfig.from_pretrained(str(saved.folder)))
        except ConfigurationError as error:
            raise ModelError(f"The change of {saved.folder} cannot be merged or moved: {error}") from error
    if family.needs_mean or saved.config.get("bias", "none") not in {"none", None}:
        raise ModelError(
            f"{saved.folder} has trained biases ({family.title}), for which layers without a bias have no place. Serve "
            "it beside its base, or train without biases to merge or move the result."
        )
    return family, scaling


def check_shared(saved: SavedAdapter, family: Family, scaling: LoraScaling, layers: Mapping[str, Layer]) -> None:
    """Raise a `ModelError` unless the tensors that all layers share are those that the family computes with here."""
    shapes = {name: layer.shape for name, layer in layers.items()}
    for key, tensor in family.shared(shapes, scaling.rank).items():
        there = saved.tensors.get(key)
        if there is None or there.shape != tensor.shape or not torch.equal(there.float(), tensor.float()):
            raise ModelError(
                f"The projections of {family.title} in {saved.folder} are those of PEFT itself, or are not there; only "
                "adapters that quailora has started can be merged or moved. Serve this one beside its base."
            )


def earlier_change(before: SavedAdapter | None) -> TrainedChange | None:
    """Return the change of an earlier training that a start holds, as `rebase` has written it; None if there is none.

    Raises:
        ModelError: if the start holds one, and the folder that has it alone is missing.
    """
    if before is None:
        return None
    origin = read_provenance(before.folder).origin
    if origin is None or not origin.holds:
        return None
    folder: Path = before.folder / EARLIER
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{before.folder} holds the change of an earlier training besides its correction, which rebase has written "
            f"to the folder {EARLIER} in it, and that is missing. Copy it there again."
        )
    saved = SavedAdapter.read(folder)
    return TrainedChange(saved, None, *family_of_saved(saved))
