"""What is to be measured of a model."""

from __future__ import annotations

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
        reference: the choice of all layers in the network whose inputs layers are fitted to.
    """

    choices: tuple[Choice, ...]
    reference: Choice

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ConfigurationError("Expected two choices for a layer, got one. Give more bits or ranks.")

    def described(self) -> dict[str, Any]:
        """Return the question as plain data."""
        return {
            "choices": [choice.as_dict() for choice in self.choices],
            "reference": self.reference.as_dict(),
        }
