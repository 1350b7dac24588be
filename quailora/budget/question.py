"""What is to be measured of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

from ..errors import ConfigurationError
from .choices import Choice

PlanRecipe = Literal["best-joint", "best"]
"""Recipes that plans are made for."""


@final
@dataclass(frozen=True)
class Question:
    """What is to be measured.

    Attributes:
        choices: what each layer can become.
        reference: the choice of all layers in the network whose inputs layers are fitted to.
        recipe: name of the recipe that layers are measured for. The base of `best` is rounded as the quantizer alone
            rounds it, which keeps a base of bitsandbytes where stock packages make it; that of `best-joint` is chosen.
    """

    choices: tuple[Choice, ...]
    reference: Choice
    recipe: PlanRecipe = "best-joint"

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ConfigurationError("Expected two choices for a layer, got one. Give more bits or ranks.")

    def described(self) -> dict[str, Any]:
        """Return the question as plain data."""
        return {
            "choices": [choice.as_dict() for choice in self.choices],
            "reference": self.reference.as_dict(),
            "recipe": self.recipe,
        }
