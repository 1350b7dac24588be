"""What a comparison measures: variants of a model, and what their runs made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..adapters.lora import LoraScaling
from ..core.weightings import GramWeighting, IdentityWeighting
from ..evaluation.scores import Scores
from ..families import Correction
from ..layer.initializer import Initializer
from ..methods.method import Method
from ..methods.recipes import Recipe
from ..pipeline.fingerprint import digest
from ..pipeline.store import StoredLayer, corrections_of, weights_of
from ..quantizers import Quantizer
from ..solvers import Zero
from ..support.settings import describe
from .sizes import Sized
from .table import Row


@final
@dataclass(frozen=True)
class Variant:
    """A variant of the model to be measured: a base alone, or with an adapter.

    Attributes:
        name: name of the row.
        method: how layers are initialized.
        recipe: name of the recipe; empty for a base alone.
        rank: rank of the row, which is that of LoRA where another family is as large; 0 for a base alone.
    """

    name: str
    method: Method
    recipe: str = ""
    rank: int = 0

    @classmethod
    def of(cls, name: str, recipe: Recipe, quantizer: Quantizer, rank: int, sized: Sized | None = None) -> Variant:
        """Return the variant of a recipe.

        Args:
            name: name of the recipe.
            recipe: the recipe.
            quantizer: quantizer of the base.
            rank: rank of the row, which is that of LoRA.
            sized: another family of adapters, of the size that it has in this row.
        """
        method = recipe.method(quantizer, LoraScaling(rank if sized is None else sized.rank))
        if sized is None:
            return cls(f"{name} r{rank}", method, name, rank)
        method = replace(method, initializer=replace(method.initializer, family=sized.family))
        return cls(f"{name} r{rank} {sized.title}", method, name, rank)

    @classmethod
    def alone(cls, name: str, quantizer: Quantizer) -> Variant:
        """Return the variant of a base without an adapter."""
        return cls(name, Method(Initializer(quantizer, Zero(), 1, IdentityWeighting()), LoraScaling(1)))

    @property
    def definition(self) -> str:
        """Everything that the row depends on beside model and data."""
        return str(self.method)

    @property
    def run_key(self) -> str:
        """Key of the result before distillation: variants that differ only in distillation share it."""
        return digest([replace(self, method=replace(self.method, distillation=None)).definition])

    @property
    def base_key(self) -> str:
        """Key of the quantized weights that the correction is added to: equal keys mean equal weights."""
        return self.run_key if self.method.changes_base else repr(self.method.initializer.quantizer)


def groups(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Return variants in groups that can share one walk.

    Variants on full-precision inputs can. On other inputs only those can that differ in nothing but the distillation.
    """
    # On full-precision inputs all methods see the same statistics. On inputs of the quantized network each method
    # decides by its own results what the layers after see, so that it needs a walk of its own.
    grouped: dict[str, list[Variant]] = {}
    for variant in variants:
        grouped.setdefault("full" if variant.method.inputs == "full" else variant.run_key, []).append(variant)
    return list(grouped.values())


@final
@dataclass(frozen=True, eq=False)
class VariantResult:
    """What the run of a variant made.

    Attributes:
        variant: the variant.
        layers: what the run made of each layer; tensors are memory-mapped.
    """

    variant: Variant
    layers: Mapping[str, StoredLayer]

    @property
    def quantized(self) -> dict[str, Tensor]:
        """`Q` of each layer, where it was kept."""
        return weights_of(self.layers)

    @property
    def corrections(self) -> dict[str, Correction]:
        """The adapter of each layer, before PEFT's scaling; none for a base alone."""
        if not self.variant.recipe:
            return {}
        return corrections_of(self.layers)

    @property
    def seconds(self) -> float:
        """Seconds that quantizing and correcting all layers took."""
        return sum(layer.record.seconds for layer in self.layers.values() if layer.record)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Mean over layers of the share of the error that the first 1, 2, ... directions remove.

        Empty where the solver does not minimise the output error, and for a base alone.
        """
        if self.variant.method.initializer.weighting != GramWeighting() or not self.variant.recipe:
            return ()
        shares = [
            layer.correction.energies.cumsum(0) / layer.record.error_none
            for layer in self.layers.values()
            if layer.correction and layer.correction.energies is not None
            if layer.record and layer.record.error_none > 0
        ]
        return tuple(torch.stack(shares).mean(0).tolist()) if shares else ()

    def row(self, scores: Mapping[str, Scores], tasks: Mapping[str, float], seconds: float) -> Row:
        """Return the row of the variant.

        Args:
            scores: scores of the variant by name of the text.
            tasks: accuracy by name of the task.
            seconds: what calibration and initialization took.
        """
        variant = self.variant
        family, rank = variant.method.family, variant.method.scaling.rank
        records = [layer.record for layer in self.layers.values() if layer.record]
        return Row(
            variant.name,
            scores,
            tasks=tasks,
            recipe=variant.recipe,
            rank=variant.rank,
            family=describe(variant.method.initializer.family),
            size=rank if variant.recipe else 0,
            shared=family.shared_numbers({record.name: record.shape for record in records}, rank),
            changes_base=variant.method.changes_base,
            seconds=round(seconds, 2),
            layers=records,
            spectrum=self.spectrum,
            method=variant.definition,
        )
