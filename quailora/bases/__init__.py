"""Bases that are quantized already: read layer by layer from the checkpoints of other tools."""

from .prequantized import Prequantized as Prequantized
from .reader import READERS as READERS
from .reader import StoredBase as StoredBase
