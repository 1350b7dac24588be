"""What is around the quantized layers of a base has to be that of the full-precision model, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.weights import resident
from .existing import ExistingBase

_SAME = 0.05  # of the largest entry: dtypes differ by less than a hundredth, and scales that are folded in by far more


@torch.no_grad()
def check_around(base: ExistingBase, model: Any) -> None:
    """Raise a `ModelError` if norms or biases of a base are others than those of the full-precision model.

    Some makers, AutoAWQ among them, multiply channels of a norm by scales and divide those of the layers behind it. The
    model is the same then, and its layers are others. Only layers of the base are read and corrected here, beside the
    norms of the full-precision model, so that adapter and perplexity would be of a model that does not exist.

    Args:
        base: the base.
        model: the full-precision model, in memory or on disk.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    found = base.vectors(names)
    for name in found:
        module, _, tensor = name.rpartition(".")
        with resident(model.get_submodule(module)):
            own: Tensor = getattr(model.get_submodule(module), tensor).float().cpu()
        other = found[name].float().cpu()
        if own.shape != other.shape:
            raise ModelError(
                f"{name} has {len(own)} numbers in the model and {len(other)} in {base.title!r}. This is the base of "
                "another model."
            )
        if (own - other).abs().max() > _SAME * own.abs().max():
            raise ModelError(
                f"{name} of {base.title!r} is another one than that of the full-precision model. This is the base of "
                "another model, or its maker has moved scales between norms and layers, as AutoAWQ does. The layers of "
                "such a base can be corrected only beside its own norms: pass a full-precision model with the same "
                "norms, or let quailora make the base."
            )
