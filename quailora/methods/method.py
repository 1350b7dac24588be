"""What to do with each layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..adapters.lora import LoraScaling
from ..layer.asymmetric import TRUST
from ..layer.initializer import Initializer
from .distillation import Polish


@final
@dataclass(frozen=True)
class Method:
    """What to do with each layer.

    Attributes:
        initializer: quantizer, metric and solver; its rank is replaced by the layer's own.
        scaling: rank of each layer.
        polish: training of the whole model that follows, if any.
        trust: for asymmetric inputs, see `initialize_asymmetric`.
    """

    initializer: Initializer
    scaling: LoraScaling
    polish: Polish | None = None
    trust: float = TRUST
