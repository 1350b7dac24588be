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
from .torchao_int8 import TorchaoInt8 as TorchaoInt8
from .uniform import Uniform as Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "nf4": NF4,
    "fp4": FP4,
    "int8": Int8,
    "uniform": Uniform,
    "gptq": GPTQ,
    "nf4_gptq": NF4GPTQ,
    "nf4_mse": NF4MSE,
    "hqq": HQQ,
    "torchao_int8": TorchaoInt8,
    "auto_gptq": AutoGPTQ,
}
"""The short names that the command line knows."""
