"""Quantization-aware initialization of low-rank adapters."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .bases import Prequantized
from .core.metrics import Diagonal, Gram, Identity
from .core.statistics import InputStatistics
from .errors import QuailoraError
from .layer.initializer import Initializer, LayerInitialization
from .quantizers import FP4, GPTQ, HQQ, NF4, NF4GPTQ, NF4MSE, AutoGPTQ, Int8, Quantizer, TorchaoInt8, Uniform
from .solvers import SVD, AlternatingLeastSquares, LowRank, Optimal, Solver, Zero

if TYPE_CHECKING:
    from .pipeline.replace_weights import replace_lora_weights

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

_LATER = {"replace_lora_weights": "quailora.pipeline.replace_weights"}
"""Functions for whole models, by the module that has each: it is imported when the function is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


__version__ = version("quailora")
