"""Quantization-aware initialization of low-rank adapters."""

from importlib.metadata import version

from .errors import QuailoraError
from .initializer import Initializer, LayerInitialization
from .metrics import Diagonal, Gram, Identity
from .quantizers import FP4, GPTQ, NF4, NF4GPTQ, NF4MSE, Int8, Quantizer, Uniform
from .solvers import SVD, AlternatingLeastSquares, LowRank, Optimal, Solver, Zero
from .statistics import InputStatistics

__all__ = [
    "FP4",
    "GPTQ",
    "NF4",
    "NF4GPTQ",
    "NF4MSE",
    "SVD",
    "AlternatingLeastSquares",
    "Diagonal",
    "Gram",
    "Identity",
    "Initializer",
    "InputStatistics",
    "Int8",
    "LayerInitialization",
    "LowRank",
    "Optimal",
    "QuailoraError",
    "Quantizer",
    "Solver",
    "Uniform",
    "Zero",
]

__version__ = version("quailora")
