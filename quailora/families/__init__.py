"""Families of adapters: what PEFT can add to a layer, and the start of each that makes up for quantization."""

from .adalora import AdaLora as AdaLora
from .adapter import Change as Change
from .adapter import Correction as Correction
from .adapter import Parameters as Parameters
from .adapter import PeftAdapter as PeftAdapter
from .base import Family as Family
from .base import Fit as Fit
from .beft import Beft as Beft
from .c3a import C3A as C3A
from .dora import Dora as Dora
from .fourierft import FourierFT as FourierFT
from .gralora import GraLora as GraLora
from .hira import Hira as Hira
from .ia3 import Ia3 as Ia3
from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .lora import Lora as Lora
from .lora_bias import LoraBias as LoraBias
from .miss import Miss as Miss
from .randlora import RandLora as RandLora
from .refused import REFUSED as REFUSED
from .refused import find_family as find_family
from .road import Road as Road
from .shira import Shira as Shira
from .vera import Vera as Vera
from .waveft import WaveFT as WaveFT

FAMILIES: dict[str, type[Family]] = {
    cls.name: cls
    for cls in (
        *(Lora, LoraBias, AdaLora, Dora, Shira, GraLora, Vera, RandLora, Miss, C3A, FourierFT, WaveFT),
        *(Hira, LoKr, LoHa, Road, Ia3, Beft),
    )
}
"""The families of quailora by their short names, in the order that `quailora list` shows them."""
