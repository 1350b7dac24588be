"""The full-precision model with what a training has changed: what is merged, and what moves to another base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..adapters.change import TrainedChange
from ..bases import ExistingBase
from ..errors import ConfigurationError, ModelError, named
from ..models.layers import Layer, all_layers
from ..models.load import LoadedModel
from ..models.weights import replace_for_good, replaced, resident
from .fingerprint import digest

Target = Literal["full", "trained"]
"""What a merged model comes close to: the full-precision weights with the change, or the weights that were trained on
with the adapter on them, `Q + s B A`."""


@final
@dataclass(frozen=True, eq=False)
class FineTuned:
    """A full-precision model with changes of trainings in its weights: `W + sum_i c_i change_i`.

    Attributes:
        changes: the changes.
        factors: the factor `c_i` of each.
        trained_on: the quantized base that the adapters were trained on; None where nothing depends on it.
        target: "trained" gives what the trained model computes with in place of `W + change`, of a single adapter:
            `Q + C`, or `Q` where there is no adapter, or `W + C` where the base has the layer in full precision.
    """

    changes: tuple[TrainedChange, ...]
    factors: tuple[float, ...] = (1.0,)
    trained_on: ExistingBase | None = None
    target: Target = "full"

    @property
    def digest(self) -> str:
        """A short hash of all that the weights depend on besides the model."""
        parts = [f"{factor!r} {change.digest}" for factor, change in zip(self.factors, self.changes, strict=True)]
        base = self.trained_on.title if self.trained_on is not None and self.needs_base else ""
        return digest([*parts, base, self.target])

    @property
    def folders(self) -> list[Path]:
        """The folders of the adapters and of their starts."""
        starts = [change.before.folder for change in self.changes if change.before is not None]
        return [*(change.trained.folder for change in self.changes), *starts]

    @property
    def needs_base(self) -> bool:
        """Whether the weights depend on the quantized base that was trained on."""
        return self.target == "trained" or any(change.needs_base for change in self.changes)

    def check(self, model: Any) -> dict[str, Layer]:
        """Return the layers of a model that change; the model may be without weights.

        Raises:
            ConfigurationError: if an adapter has tensors for other layers or modules, or biases change.
        """
        layers = all_layers(model)
        found: dict[str, Layer] = {}
        for change in self.changes:
            found |= change.layers(layers)
            modules_of(model, change)
        return found

    @contextmanager
    def within(self, loaded: LoadedModel, spill: Path, *, for_good: bool) -> Iterator[None]:
        """Change the weights of a model, one layer after the other, inside a `with` statement.

        Args:
            loaded: the full-precision model, in memory or on disk.
            spill: folder for the changed weights of a model on disk.
            for_good: leave the changed weights in the model, which saves the memory of the others.
        """
        layers = all_layers(loaded.model)
        chosen = [change.layers(layers) for change in self.changes]
        every = self.among(layers, chosen)
        weights = Computed(every, lambda layer: self.weight(layer, chosen))
        modules = {key: layer for change in self.changes for key, layer in modules_of(loaded.model, change).items()}
        whole = {key: tensor for change in self.changes for key, tensor in change.modules.items()}
        # Weights are computed one by one, when they are put in place. A model that the caller holds gets its own back;
        # one that was loaded for the run keeps the others, without a second copy.
        if not for_good:
            with replaced(every, weights), replaced(modules, whole):
                yield
            return
        spill.mkdir(parents=True, exist_ok=True)
        replace_for_good(every, weights, spill)
        replace_for_good(modules, whole, spill)
        yield

    def among(self, layers: Mapping[str, Layer], chosen: list[dict[str, Layer]]) -> dict[str, Layer]:
        """Return the layers whose weights are others than in the full-precision model.

        Args:
            layers: all layers of the model.
            chosen: the layers that each of the changes has.
        """
        # Of the model that was trained, layers without an adapter are those of the base.
        quantized = self.trained_on.layers if self.target == "trained" and self.trained_on is not None else frozenset()
        return {
            name: layer for name, layer in layers.items() if name in quantized or any(name in one for one in chosen)
        }

    def weight(self, layer: Layer, chosen: list[dict[str, Layer]]) -> Tensor:
        """Return the changed weight of a layer whose own weight is in memory, in its dtype.

        Args:
            layer: the layer.
            chosen: the layers that each of the changes has.
        """
        weight = layer.weight
        if self.target == "trained":
            (change,), (own,), there = self.changes, chosen, self.base_weight(layer)
            return (change.effective(layer, own, there) if layer.name in own else there).to(weight)
        changes = any(layer.name in own for own in chosen)
        base = self.base_weight(layer) if self.needs_base and changes else None
        total = torch.zeros(weight.shape)
        for change, factor, own in zip(self.changes, self.factors, chosen, strict=True):
            if layer.name in own:
                total += factor * change.of(layer, own, base)
        return (weight.float() + total.to(weight.device)).to(weight.dtype)

    def base_weight(self, layer: Layer) -> Tensor:
        """Return the weight of a layer in the base that was trained on; its own where that is in full precision.

        Raises:
            ModelError: if the base is not known.
        """
        if self.trained_on is None:
            raise ModelError("The base that the adapter was trained on is not known.")
        if layer.name not in self.trained_on.layers:
            return layer.weight
        with named(layer.name):
            return self.trained_on.weight_of(layer).dequantize()


@final
@dataclass(frozen=True, eq=False)
class Computed(Mapping[str, Tensor]):
    """Weights of layers by name, computed when they are asked for.

    Attributes:
        layers: the layers.
        compute: returns the weight of a layer, whose own weight is in memory meanwhile.
    """

    layers: Mapping[str, Layer]
    compute: Callable[[Layer], Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        with resident(self.layers[name].module):
            return self.compute(self.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def modules_of(model: Any, change: TrainedChange) -> dict[str, Layer]:
    """Return the parameters of a model that a training has changed as a whole, by their names.

    Raises:
        ConfigurationError: if the model does not have one, has it in another shape, or shares it with another module
            that was not changed in the same way.
    """
    # PEFT copies a module that is trained whole, so that what it shares with another one is not shared in training. A
    # model whose configuration ties both cannot hold them apart.
    known = dict(model.named_parameters(remove_duplicate=False))
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, Layer] = {}
    for key, tensor in change.modules.items():
        if key not in known or known[key].shape != tensor.shape:
            there = f"of {tuple(known[key].shape)}" if key in known else "no such parameter"
            raise ConfigurationError(
                f"Expected the module {key} of {tuple(tensor.shape)}, which was trained whole, in the model, got "
                f"{there}. "
                "A vocabulary that was enlarged for the training has to be enlarged in the model first."
            )
        partners = [one for pair in tied.items() for one in pair if key in pair and one != key]
        for partner in partners:
            other = change.modules.get(partner)
            if other is None or not torch.equal(other, tensor):
                raise ConfigurationError(
                    f"The model shares the weights of {key} with {partner}, and training has changed them apart. Save "
                    "the model with tie_word_embeddings=False first, and pass that as `model`."
                )
        module, _, parameter = key.rpartition(".")
        found[key] = Layer(key, model.get_submodule(module), parameter)
    return found
