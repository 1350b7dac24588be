"""What a comparison measures: contenders before their run, and entries after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..adapters.lora import LoraScaling
from ..calibration.walk import InputsOf
from ..core.objective import Factors
from ..evaluation.scores import Scores
from ..layer.initializer import Initializer
from ..methods.method import Method
from ..methods.recipes import Recipe
from ..pipeline.checkpoint import Outcome
from ..pipeline.fingerprint import digest
from ..quantizers import Quantizer
from ..solvers import Zero
from .table import Row


@final
@dataclass(frozen=True)
class Contender:
    """One row to be measured.

    Attributes:
        name: of the row.
        method: how layers are initialized.
        recipe: name of the recipe; empty for a base alone.
        inputs: see `Walk`.
        changes_base: whether its base is another one than the quantizer alone gives.
    """

    name: str
    method: Method
    recipe: str = ""
    inputs: InputsOf = "full"
    changes_base: bool = False

    @classmethod
    def of(cls, name: str, row: Recipe, quantizer: Quantizer, rank: int) -> Contender:
        """Return a recipe at a rank."""
        method = row.method(quantizer, LoraScaling(rank))
        return cls(f"{name} r{rank}", method, name, row.inputs, row.changes_base)

    @classmethod
    def alone(cls, name: str, quantizer: Quantizer) -> Contender:
        """Return a base without an adapter."""
        return cls(name, Method(Initializer(quantizer, Zero(), 1, "identity"), LoraScaling(1)))

    @property
    def definition(self) -> str:
        """Everything that the row depends on beside model and data."""
        return f"{self.method} on {self.inputs} inputs"

    @property
    def walked(self) -> str:
        """Names what it is after the walk through the model, before any training."""
        return digest([replace(self, method=replace(self.method, polish=None)).definition])

    @property
    def base(self) -> str:
        """Names the weights that its correction is added to; the same name, the same weights."""
        return self.walked if self.changes_base else repr(self.method.initializer.quantizer)


def groups(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Return contenders in groups that can share one walk.

    All on full-precision inputs can; on other inputs those that are the same but for a training that follows.
    """
    found: dict[str, list[Contender]] = {}
    for contender in contenders:
        found.setdefault("full" if contender.inputs == "full" else contender.walked, []).append(contender)
    return list(found.values())


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """A contender after its run.

    Attributes:
        contender: which.
        outcomes: what became of each layer; tensors are memory-mapped.
    """

    contender: Contender
    outcomes: Mapping[str, Outcome]

    @property
    def quantized(self) -> dict[str, Tensor]:
        """`Q` of each layer, where it was kept."""
        return {name: one.dequantized for name, one in self.outcomes.items() if one.dequantized is not None}

    @property
    def factors(self) -> dict[str, Factors]:
        """Factors of each layer, before PEFT's scaling; none for a base alone."""
        found = {name: one.correction for name, one in self.outcomes.items() if one.correction is not None}
        return {name: low.factors for name, low in found.items()} if self.contender.recipe else {}

    @property
    def seconds(self) -> float:
        """What quantizing and correcting all layers took."""
        return sum(one.record.seconds for one in self.outcomes.values() if one.record)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Mean over layers of the share of the error that the first 1, 2, ... directions remove.

        Empty where the solver does not minimise the output error, and for a base alone.
        """
        if self.contender.method.initializer.metric != "gram" or not self.contender.recipe:
            return ()
        shares = [
            one.correction.energies.cumsum(0) / one.record.error_none
            for one in self.outcomes.values()
            if one.correction and one.record and one.record.error_none > 0
        ]
        return tuple(torch.stack(shares).mean(0).tolist()) if shares else ()

    def row(self, scores: Mapping[str, Scores], tasks: Mapping[str, float], seconds: float) -> Row:
        """Return the row of these scores by text and by task, which took so long."""
        contender = self.contender
        return Row(
            contender.name,
            scores,
            tasks=tasks,
            recipe=contender.recipe,
            rank=contender.method.scaling.rank if contender.recipe else 0,
            changes_base=contender.changes_base,
            seconds=round(seconds, 2),
            layers=[one.record for one in self.outcomes.values() if one.record],
            spectrum=self.spectrum,
            method=contender.definition,
        )
