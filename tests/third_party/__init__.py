"""What somebody else may write for quailora: a quantizer, a solver, a family, and more, in a package.

quailora init MODEL --plugin third_party --quantizer signs --solver careful --metric loudness --save-base --out adapter
quailora init MODEL --recipe third_party:TAKEN_OFF --out adapter
"""

from quailora.methods.recipes import Recipe

from .family import Inputwise as Inputwise
from .quantizer import Signs
from .schedule import TakenOff
from .solver import Careful
from .weighting import Loudness

__all__ = ["TAKEN_OFF", "Careful", "Inputwise", "Loudness", "Signs", "TakenOff"]

TAKEN_OFF = Recipe("a package of somebody else", Careful(damping=0.1), weighting=Loudness(), schedule=TakenOff())
