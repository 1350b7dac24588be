"""What is to be measured of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from ..errors import ConfigurationError
from .choices import Choice


@final
@dataclass(frozen=True)
class Question:
    """What is to be measured.

    Attributes:
        choices: what each layer can become.
        reference: the choice of all layers in the network in which layers are measured.
        probe: the choice towards which the weight of one layer after the other is changed, to see what errors cost.
    """

    choices: tuple[Choice, ...]
    reference: Choice
    probe: Choice

    @classmethod
    def near(cls, choices: Sequence[Choice], reference: Choice) -> Question:
        """Return the question around a reference: the probe is its next coarser quantizer, without an adapter.

        Around the coarsest quantizer it is the next finer one.

        Raises:
            ConfigurationError: if there is nothing to compare the reference with.
        """
        # A coarser base errs in the directions in which bases do err, and about twice as far for each bit.
        bare = list(dict.fromkeys(Choice(choice.quantizer) for choice in choices))
        at = bare.index(Choice(reference.quantizer))
        others = [bare[at - 1] if at else bare[min(1, len(bare) - 1)], bare[at], *choices]
        probe = next((choice for choice in others if choice != reference and choice in choices), None)
        if probe is None:
            raise ConfigurationError("Expected two choices for a layer, got one. Give more bits or ranks.")
        return cls(tuple(choices), reference, probe)

    def described(self) -> dict[str, Any]:
        """Return the question as plain data."""
        return {
            "choices": [choice.as_dict() for choice in self.choices],
            "reference": self.reference.as_dict(),
            "probe": self.probe.as_dict(),
        }
