"""Solvers: from a quantization error to a low-rank correction. If unsure, use `Optimal`."""

from .als import AlternatingLeastSquares as AlternatingLeastSquares
from .base import LowRank as LowRank
from .base import Solver as Solver
from .optimal import Optimal as Optimal
from .svd import SVD as SVD
from .zero import Zero as Zero

SOLVERS: dict[str, type[Solver]] = {cls.name: cls for cls in (Zero, SVD, AlternatingLeastSquares, Optimal)}
"""The solvers of quailora by their short names, in the order that `quailora list` shows them."""
