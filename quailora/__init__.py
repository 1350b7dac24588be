"""Quantization-aware initialization of low-rank adapters.

Names are imported when they are first used, so that the command line's help does not wait for PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bases import Prequantized
    from .core.metrics import Diagonal, Gram, Identity
    from .core.statistics import InputStatistics
    from .errors import QuailoraError
    from .layer.initializer import Initializer, LayerInitialization
    from .pipeline.replace_weights import replace_lora_weights
    from .quantizers import FP4, GPTQ, HQQ, NF4, NF4GPTQ, NF4MSE, AutoGPTQ, Int8, Quantizer, TorchaoInt8, Uniform
    from .solvers import SVD, AlternatingLeastSquares, LowRank, Optimal, Solver, Zero

_HOMES = {
    "bases": ("Prequantized",),
    "core.metrics": ("Diagonal", "Gram", "Identity"),
    "core.statistics": ("InputStatistics",),
    "errors": ("QuailoraError",),
    "layer.initializer": ("Initializer", "LayerInitialization"),
    "pipeline.replace_weights": ("replace_lora_weights",),
    "quantizers": (
        *("FP4", "GPTQ", "HQQ", "NF4", "NF4GPTQ", "NF4MSE", "AutoGPTQ", "Int8", "Quantizer", "TorchaoInt8", "Uniform"),
    ),
    "solvers": ("SVD", "AlternatingLeastSquares", "LowRank", "Optimal", "Solver", "Zero"),
}
"""The names that there are at top level, by the module that each is imported from; above, for type checkers."""

__all__ = [
    "FP4",
    "GPTQ",
    "HQQ",
    "NF4",
    "NF4GPTQ",
    "NF4MSE",
    "SVD",
    "AlternatingLeastSquares",
    "AutoGPTQ",
    "Diagonal",
    "Gram",
    "Identity",
    "Initializer",
    "InputStatistics",
    "Int8",
    "LayerInitialization",
    "LowRank",
    "Optimal",
    "Prequantized",
    "QuailoraError",
    "Quantizer",
    "Solver",
    "TorchaoInt8",
    "Uniform",
    "Zero",
    "replace_lora_weights",
]

__version__ = version("quailora")


def __getattr__(name: str) -> Any:
    """Import a name of the table when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
