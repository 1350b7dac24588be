"""Bases that are quantized already: read layer by layer from the checkpoints of other tools, and written."""

from .existing import ExistingBase as ExistingBase
from .reader import READERS as READERS
from .reader import StoredBase as StoredBase
