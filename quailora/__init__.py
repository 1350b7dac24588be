"""Quantization-aware initialization of low-rank adapters."""

from importlib.metadata import version

from .bases import Prequantized
from .core.metrics import Diagonal, Gram, Identity
from .core.statistics import InputStatistics
from .errors import QuailoraError
from .layer.initializer import Initializer, LayerInitialization
from .quantizers import FP4, GPTQ, HQQ, NF4, NF4GPTQ, NF4MSE, AutoGPTQ, Int8, Quantizer, TorchaoInt8, Uniform
from .solvers import SVD, AlternatingLeastSquares, LowRank, Optimal, Solver, Zero

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
]

__version__ = version("quailora")
