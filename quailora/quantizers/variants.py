"""Other ways to find the codes and scales of a format that leaves them open."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigurationError
from .base import Quantizer
from .gptq import GPTQ
from .nf4 import NF4
from .nf4_gptq import NF4GPTQ
from .nf4_mse import NF4MSE
from .uniform import Uniform


def with_feedback(quantizer: Quantizer, damping: float | None = None, mse: bool | None = None) -> Quantizer:
    """Return the quantizer that rounds to the format of another one with error feedback.

    Args:
        quantizer: `Uniform`, `NF4` or one of their kin.
        damping: see `GPTQ`; as the quantizer's own by default, or that of `GPTQ` where it has none. Correlations are
            not shrunk unless the quantizer does so itself: published methods do not.
        mse: whether scales have the least squared error; as the quantizer's own by default.

    Raises:
        ConfigurationError: if there is none.
    """
    if mse is None:
        mse = isinstance(quantizer, NF4MSE) or bool(getattr(quantizer, "mse", False))
    if damping is None:
        damping = float(getattr(quantizer, "damping", GPTQ.damping))
    if isinstance(quantizer, (GPTQ, NF4GPTQ)):
        return replace(quantizer, damping=damping, mse=mse)
    if isinstance(quantizer, Uniform):
        return GPTQ(quantizer.bits, quantizer.group_size, quantizer.symmetric, damping=damping, mse=mse, shrinkage=0.0)
    if isinstance(quantizer, (NF4, NF4MSE)):
        return NF4GPTQ(quantizer.block_size, quantizer.double_quantization, damping=damping, mse=mse, shrinkage=0.0)
    raise ConfigurationError(f"There is no rounding with error feedback for {quantizer!r}; take NF4 or Uniform.")


def with_least_error(quantizer: Quantizer) -> Quantizer:
    """Return the quantizer that rounds to the nearest levels of the format of another one, scales of the least error.

    Raises:
        ConfigurationError: if there is none.
    """
    if isinstance(quantizer, (Uniform, GPTQ)):
        return Uniform(quantizer.bits, quantizer.group_size, quantizer.symmetric, mse=True)
    if isinstance(quantizer, (NF4, NF4MSE, NF4GPTQ)):
        return NF4MSE(quantizer.block_size, quantizer.double_quantization)
    raise ConfigurationError(f"There are no scales to choose for {quantizer!r}; take NF4 or Uniform.")
