"""What is known of the layers of a model before a plan: bytes of each choice, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..errors import ModelError
from ..models.files import read_json
from ..support.files import StrPath, write_json
from .choices import Choice, PlannedLayer

MEASURED = "measurements.json"
"""Name of the measurements in the folder that `quailora plan` writes."""


@final
@dataclass(frozen=True)
class MeasuredLayer:
    """One layer.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes of base and adapter with each choice; 0 for a choice that no checkpoint holds.
        costs: divergence of the predictions from full precision that each choice costs, in nats per token, to the
            second order of its error, less what later layers make up for; infinite for ranks that the layer cannot
            carry. See `costs.py`.
    """

    shape: tuple[int, int]
    nbytes: tuple[int, ...]
    costs: tuple[float, ...]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Measurements:
    """The layers of a model as they were measured.

    Attributes:
        model: hub name or folder of the model.
        fingerprint: what the measurement depends on, item by item.
        choices: what each layer can become.
        reference: the choice of all layers in the reference network.
        recipe: name of the recipe that layers were measured for; see `Question`.
        divergence: divergence of the predictions of the reference network from full precision, in nats per token.
        other_bytes: bytes of all but the layers, such as embeddings and norms; and in AutoGPTQ's format 4 bytes for the
            order of each column.
        layers: the layers by name, in the order of the model.
        seconds: how long the measurement took.
        others: linear layers that were not measured; see `BudgetPlan`.
    """

    model: str
    fingerprint: Mapping[str, str]
    choices: tuple[Choice, ...]
    reference: Choice
    recipe: str
    divergence: float
    other_bytes: int
    layers: Mapping[str, MeasuredLayer]
    seconds: float
    others: Mapping[str, PlannedLayer] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Measurements({self.model!r}: {len(self.layers)} layers, {len(self.choices)} choices)"

    @cached_property
    def sizes(self) -> Float[ndarray, "layers choices"]:
        """Bytes of each layer with each choice."""
        return np.array([layer.nbytes for layer in self.layers.values()], dtype=float)

    @property
    def weights(self) -> int:
        """Number of weights in the layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @cached_property
    def costs(self) -> Float[ndarray, "layers choices"]:
        """Divergence that each choice is expected to cost in each layer, in nats per token.

        Infinite for choices that a layer cannot have.
        """
        # The costs of all layers in the reference network have to add up to its divergence, which was measured as a
        # whole. They do not quite, because divergences grow more slowly than the squares of large errors.
        costs = self._measured
        own = costs[np.arange(len(costs)), self.everywhere(self.reference)]
        total = float(own[np.isfinite(own)].sum())
        return costs * (self.divergence / total if total > 0 else 1.0)

    @cached_property
    def _measured(self) -> Float[ndarray, "layers choices"]:
        """Costs of the layers as they were measured, infinite for choices that no checkpoint holds."""
        costs = np.array([layer.costs for layer in self.layers.values()], dtype=float)
        return np.where(self.sizes > 0, costs, np.inf)

    def everywhere(self, choice: Choice) -> Int[ndarray, " layers"]:
        """Return the number of a choice for each layer, with a lower rank where a layer cannot carry that of it."""
        # A small layer cannot carry a high rank, and comparisons of uniform choices should not end there. It gets the
        # highest rank with the same quantizer that was measured for it.
        choices = self.choices
        same = [number for number, one in enumerate(choices) if one.quantizer == choice.quantizer]
        lower = sorted((n for n in same if choices[n].rank <= choice.rank), key=lambda n: -choices[n].rank)
        return np.array(
            [next((n for n in lower if np.isfinite(row[n])), lower[-1]) for row in self._measured], dtype=int
        )

    def expected(self, chosen: Sequence[int]) -> float:
        """Return the expected divergence with a choice for each layer, in nats per token."""
        return float(self.costs[np.arange(len(self.layers)), np.asarray(chosen)].sum())

    def bits(self, nbytes: float) -> float:
        """Return bytes of all layers as bits for each of their weights."""
        return 8 * nbytes / self.weights

    def write(self, file: StrPath) -> None:
        """Write the measurements as JSON."""
        content = {
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "choices": [choice.as_dict() for choice in self.choices],
            "reference": self.choices.index(self.reference),
            "recipe": self.recipe,
            "divergence": self.divergence,
            "other_bytes": self.other_bytes,
            "seconds": self.seconds,
            "layers": {
                name: {
                    "shape": list(layer.shape),
                    "nbytes": list(layer.nbytes),
                    "costs": [cost if np.isfinite(cost) else None for cost in layer.costs],
                }
                for name, layer in self.layers.items()
            },
            "others": {name: layer.as_dict() for name, layer in self.others.items()},
        }
        write_json(Path(file), content)

    @classmethod
    def read(cls, place: StrPath) -> Measurements:
        """Read measurements from their file, or from the folder that `quailora plan` has written.

        Raises:
            ModelError: if the file is missing, damaged, or of another version.
        """
        path = Path(place).expanduser()
        file = path / MEASURED if path.is_dir() else path
        content = read_json(file)
        try:
            choices = tuple(Choice.read(one) for one in content["choices"])
            return cls(
                model=content["model"],
                fingerprint=content["fingerprint"],
                choices=choices,
                reference=choices[content["reference"]],
                recipe=content["recipe"],
                divergence=float(content["divergence"]),
                other_bytes=int(content["other_bytes"]),
                layers={name: measured_layer(one, len(choices)) for name, one in content["layers"].items()},
                seconds=float(content["seconds"]),
                others={name: PlannedLayer.read(one) for name, one in content["others"].items()},
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"The measurements in {file} are damaged: {error!r}. Measure again.") from error


def measured_layer(content: Mapping[str, Any], choices: int) -> MeasuredLayer:
    """Build one layer from JSON; raises a `ValueError` if it does not have every choice."""
    rows, columns = content["shape"]
    costs = tuple(float("inf") if cost is None else float(cost) for cost in content["costs"])
    nbytes = tuple(map(int, content["nbytes"]))
    if not len(costs) == len(nbytes) == choices:
        raise ValueError(f"{len(costs)} costs and {len(nbytes)} sizes for {choices} choices")
    return MeasuredLayer((int(rows), int(columns)), nbytes, costs)
