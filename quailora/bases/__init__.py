"""Bases that are quantized already: read layer by layer from the checkpoints of other tools."""

from .prequantized import Prequantized as Prequantized
from .stored import READERS as READERS
from .stored import StoredBase as StoredBase
