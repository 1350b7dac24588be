"""What is known of the layers of a model before a plan: bytes and errors of each choice, and what errors cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..errors import ModelError
from ..models.files import read_json
from ..support.files import write_json
from .choices import Choice

_FLOOR = 0.1  # of the median price of a layer of the same kind, for layers whose measured price is below it


@final
@dataclass(frozen=True)
class MeasuredLayer:
    """One layer.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes of base and adapter with each choice; 0 for a choice that no checkpoint holds.
        errors: squared output error with each choice on held-out tokens, total over outputs, mean over tokens; see
            `LayerErrors`.
        step: squared change of the output by a step of the weight from the reference towards the probe, likewise.
        divergence: divergence of the predictions from those of full precision, in nats per token, if in the reference
            network this step is added to the weight of this layer, and if it is taken off: the mean of both.
    """

    shape: tuple[int, int]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]
    step: float
    divergence: float


@final
@dataclass(frozen=True, eq=False)
class Measurements:
    """The layers of a model as they were measured.

    Attributes:
        model: hub name or folder of the model.
        fingerprint: what the measurement depends on, item by item.
        choices: what each layer can become.
        reference: the choice of all layers in the reference network.
        probe: the choice towards which the weight of one layer after the other was changed.
        divergence: divergence of the predictions of the reference network from full precision, in nats per token.
        other_bytes: bytes of all that is not quantized, such as embeddings and norms.
        layers: the layers by name, in the order of the model.
        seconds: how long the measurement took.
    """

    model: str
    fingerprint: Mapping[str, str]
    choices: tuple[Choice, ...]
    reference: Choice
    probe: Choice
    divergence: float
    other_bytes: int
    layers: Mapping[str, MeasuredLayer]
    seconds: float

    @cached_property
    def sizes(self) -> Float[ndarray, "layers choices"]:
        """Bytes of each layer with each choice."""
        return np.array([layer.nbytes for layer in self.layers.values()], dtype=float)

    @cached_property
    def errors(self) -> Float[ndarray, "layers choices"]:
        """Errors of each layer with each choice."""
        return np.array([layer.errors for layer in self.layers.values()], dtype=float)

    @property
    def weights(self) -> int:
        """Number of weights in the layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @cached_property
    def prices(self) -> Float[ndarray, " layers"]:
        """Divergence that a unit of each layer's error costs, in nats per token."""
        # The step changes the output of one layer by a known amount, and the divergence by a measured one. To the
        # second order, the divergence is a quadratic form in the errors of all layers. Errors of different layers are
        # nearly uncorrelated, so that it is a sum over layers, each in proportion to its squared error.
        at = self.choices.index(self.reference)
        change = np.array([layer.divergence for layer in self.layers.values()]) - self.divergence
        step = np.array([layer.step for layer in self.layers.values()])
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(step == 0, 0.0, change / step)
        # A price can be too low by chance, or even negative, and the programme would take just these layers. No layer
        # counts less than a share of what is usual for its kind, or for all layers.
        kinds = [name.rpartition(".")[2] for name in self.layers]
        scale = self.errors[:, at]
        positive = (found * scale)[found > 0]
        typical = np.median(positive) if len(positive) else 1.0
        for one in dict.fromkeys(kinds):
            same = np.array([kind == one for kind in kinds])
            usual = np.median((found * scale)[same])
            least = _FLOOR * (usual if usual > 0 else typical) / np.where(scale > 0, scale, np.inf)
            found = np.where(same, np.maximum(found, least), found)
        # The sum over all layers of the reference network has to give its divergence, which was measured. It does not
        # by itself: the error of a probe is large, and divergences grow more slowly than large errors.
        total = float((found * scale).sum())
        return found * (self.divergence / total) if total > 0 else found

    @cached_property
    def costs(self) -> Float[ndarray, "layers choices"]:
        """Divergence that each choice is expected to cost in each layer, in nats per token.

        Infinite for choices that a layer cannot have.
        """
        # A small layer has an error for the rank of the reference network even if it cannot carry that rank: the one
        # that it has with the highest rank that it can.
        limits = np.array([min(layer.shape) for layer in self.layers.values()])
        carried = np.array([choice.rank for choice in self.choices]) <= limits[:, None]
        usable = carried & np.isfinite(self.errors) & (self.sizes > 0)
        return np.where(usable, self.prices[:, None] * np.where(usable, self.errors, 0.0), np.inf)

    def expected(self, chosen: Sequence[int]) -> float:
        """Return the expected divergence with a choice for each layer, in nats per token."""
        return float(self.costs[np.arange(len(self.layers)), np.asarray(chosen)].sum())

    def bits(self, nbytes: float) -> float:
        """Return bytes of all layers as bits for each of their weights."""
        return 8 * nbytes / self.weights

    def write(self, file: Path) -> None:
        """Write the measurements as JSON."""
        content = {
            "model": self.model,
            "fingerprint": dict(self.fingerprint),
            "choices": [choice.as_dict() for choice in self.choices],
            "reference": self.choices.index(self.reference),
            "probe": self.choices.index(self.probe),
            "divergence": self.divergence,
            "other_bytes": self.other_bytes,
            "seconds": self.seconds,
            "layers": {
                name: {
                    "shape": list(layer.shape),
                    "nbytes": list(layer.nbytes),
                    "errors": [error if np.isfinite(error) else None for error in layer.errors],
                    "step": layer.step,
                    "divergence": layer.divergence,
                }
                for name, layer in self.layers.items()
            },
        }
        write_json(file, content)

    @classmethod
    def read(cls, file: Path) -> Measurements:
        """Read measurements.

        Raises:
            ModelError: if the file is missing, damaged, or of another version.
        """
        content = read_json(file)
        try:
            choices = tuple(Choice.read(one) for one in content["choices"])
            return cls(
                model=content["model"],
                fingerprint=content["fingerprint"],
                choices=choices,
                reference=choices[content["reference"]],
                probe=choices[content["probe"]],
                divergence=float(content["divergence"]),
                other_bytes=int(content["other_bytes"]),
                layers={name: measured_layer(one, len(choices)) for name, one in content["layers"].items()},
                seconds=float(content["seconds"]),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"The measurements in {file} are damaged: {error!r}. Measure again.") from error


def measured_layer(content: Mapping[str, Any], choices: int) -> MeasuredLayer:
    """Build one layer from JSON; raises a `ValueError` if it does not have every choice."""
    rows, columns = content["shape"]
    errors = tuple(float("inf") if error is None else float(error) for error in content["errors"])
    nbytes = tuple(map(int, content["nbytes"]))
    if not len(errors) == len(nbytes) == choices:
        raise ValueError(f"{len(errors)} errors and {len(nbytes)} sizes for {choices} choices")
    return MeasuredLayer(
        (int(rows), int(columns)), nbytes, errors, float(content["step"]), float(content["divergence"])
    )
