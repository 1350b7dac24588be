"""How quantization and correction of one layer follow each other: once, in turns, or with the weight prepared first.

A schedule decides what is quantized. The correction is always solved for last, on the quantized weight that was chosen,
so it is optimal for that weight whatever came before.
"""

from .alternate import Alternate as Alternate
from .base import Schedule as Schedule
from .base import Solve as Solve
from .held_out import HeldOut as HeldOut
from .magr import MagR as MagR
from .once import Once as Once
from .projq import ProjQ as ProjQ
from .srr import SRR as SRR

SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (Once, Alternate, SRR, ProjQ, MagR, HeldOut)}
"""The schedules of quailora by their short names."""
