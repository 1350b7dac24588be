"""Solvers: from a quantization error to a low-rank correction. If unsure, use `Optimal`."""

from .als import AlternatingLeastSquares as AlternatingLeastSquares
from .base import Correction as Correction
from .base import LowRank as LowRank
from .base import Solver as Solver
from .optimal import Optimal as Optimal
from .svd import SVD as SVD
from .zero import Zero as Zero

SOLVERS: dict[str, type[Solver]] = {
    "zero": Zero,
    "svd": SVD,
    "quailora": AlternatingLeastSquares,
    "optimal": Optimal,
}
"""The short names that the command line knows."""
