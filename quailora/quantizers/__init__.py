"""Quantizers: from a weight to fewer bits. If unsure, use `NF4`, the base of QLoRA."""

from .auto_gptq import AutoGPTQ as AutoGPTQ
from .base import QuantizedWeight as QuantizedWeight
from .base import Quantizer as Quantizer
from .fp4 import FP4 as FP4
from .gptq import GPTQ as GPTQ
from .hqq import HQQ as HQQ
from .int8 import Int8 as Int8
from .nf4 import NF4 as NF4
from .nf4_gptq import NF4GPTQ as NF4GPTQ
from .nf4_mse import NF4MSE as NF4MSE
from .sign import Sign as Sign
from .sign_gptq import SignGPTQ as SignGPTQ
from .torchao_int8 import TorchaoInt8 as TorchaoInt8
from .uniform import Uniform as Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.name: cls
    for cls in (NF4, FP4, Int8, Uniform, GPTQ, NF4GPTQ, NF4MSE, HQQ, TorchaoInt8, Sign, SignGPTQ, AutoGPTQ)
}
"""The quantizers of quailora by their short names, in the order that `quailora list` shows them."""
