"""Read an adapter that was just written as stock PEFT reads it, before it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.objective import Factors
from ..errors import ModelError, NumericalError, summary
from ..families import Correction, Family
from ..models.layers import Layer
from .files import adapter_shapes, stored_parameters
from .lora import PREFIX, LoraScaling, expert_stacks
from .peft_check import adapted_copy, adapter_parameters, loaded_by_peft, parameter_of, shapes_of

_PROBES = 2
_ROUNDING = 1e-5  # of three products in float32, relative to the largest sums that they could give


def check_files(
    folder: Path,
    model: Any,
    layers: Mapping[str, Layer],
    corrections: Mapping[str, Correction],
    family: Family,
    scaling: LoraScaling,
    modules: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check that an adapter on disk is the one that should have been written.

    Args:
        folder: the adapter's folder.
        model: the model without weights; it is left as it was.
        layers: its layers that have a correction.
        corrections: what stock PEFT shall compute.
        family: the kind of adapter.
        scaling: ranks and alphas of the adapter.
        modules: tensors of the modules that are trained whole, by their names in the file.
        dtype: dtype that tensors are stored in.

    Raises:
        ModelError: if PEFT does not use one of its tensors, or looks for others.
        NumericalError: if a number is not finite, or `s B A` is not the correction to the rounding of float32.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
        adapted = adapted_copy(model, PeftConfig.from_pretrained(str(folder)))
        loaded, whole = loaded_by_peft(adapted, tensors), whole_modules(adapted)
    except Exception as error:  # PEFT passes on many kinds
        raise ModelError(f"Stock PEFT cannot load the adapter that was made ({summary(error)}).") from error
    expected = {key: shape for key, (_, shape) in adapter_shapes(layers, family, scaling).items()}
    fixed = family.shared(shapes_of(layers), scaling.rank)
    expected |= {key: tuple(tensor.shape) for key, tensor in fixed.items()}
    fixed_ends = tuple(family.untrained)
    parameters = [key for key in expected if key not in fixed and not key.endswith(fixed_ends)]
    lost = [key for key in expected if key not in tensors]
    lost += [key for key in parameters if key in tensors and not _is_same(loaded.get(parameter_of(key)), tensors[key])]
    whole_tensors = {key: tensors.pop(key, None) for key in modules or {}}
    lost += [key for key, tensor in whole_tensors.items() if tensor is None or key not in whole]
    expected_parameters = adapter_parameters(adapted)
    if (
        lost
        or expected_parameters != loaded.keys()
        or expected != {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    ):
        other = next(
            iter((*lost, *(expected_parameters ^ loaded.keys()), *(tensors.keys() - expected.keys()))),
            "of other shapes",
        )
        raise ModelError(
            f"Stock PEFT does not load the adapter that was made whole: it uses {len(expected) - len(lost)} of "
            f"{len(tensors)} tensors, and looks for {len(expected_parameters)}. The first that differs is {other}."
        )
    if family.name != "lora":
        check_stored(tensors, corrections, scaling, dtype)
        return
    for name, (lora_B, lora_A) in factors_in(tensors, layers).items():
        check_function(name, lora_A, lora_B, scaling.scale_of(layers[name].group), corrections[name], dtype)


def check_stored(
    tensors: Mapping[str, Tensor], corrections: Mapping[str, Correction], scaling: LoraScaling, dtype: torch.dtype
) -> None:
    """Raise a `NumericalError` unless the tensors of a file are those of the corrections, and finite."""
    for name, correction in corrections.items():
        for end, tensor in stored_parameters(name, correction, scaling, dtype).items():
            there = tensors[f"{PREFIX}{name}.{end}"]
            if not there.isfinite().all() or not torch.equal(there, tensor):
                raise NumericalError(
                    f"The tensor {end} of {name} in the file is not finite, or is another one than was made. Try a "
                    "lora_alpha near the rank, and a folder on another disk."
                )


def whole_modules(adapted: Any) -> set[str]:
    """Return the names in an adapter file of the parameters that are trained whole."""
    mark = ".modules_to_save.default"
    return {name.replace(mark, "") for name, _ in adapted.named_parameters() if mark in name}


def _is_same(loaded: Tensor | None, tensor: Tensor) -> bool:
    return loaded is not None and torch.equal(loaded, tensor)


def factors_in(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, Factors]:
    """Return the factors of each layer from the tensors of an adapter file."""
    factors = {
        name: Factors(tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"])
        for name, layer in layers.items()
        if layer.expert is None
    }
    for stack in expert_stacks(layers):
        factors |= stack.factors(tensors)
    return factors


def check_function(
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    correction: Correction,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise a `NumericalError` if `scale * lora_B @ lora_A`, computed as PEFT does, is not the correction.

    Args:
        name: name of the layer.
        lora_A: (rank, in_features), as PEFT stores it.
        lora_B: (out_features, rank).
        scale: the number that PEFT multiplies the product of the factors by.
        correction: the correction before PEFT's scaling.
        dtype: dtype that factors are stored in.
    """
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise NumericalError(f"The adapter of {name} is NaN or infinite in float32. Try a lora_alpha near the rank.")
    # Random probes find a wrong product almost surely, and cost two columns in place of a dense matrix. The limit
    # follows the rounding of sums in float32: it is relative to the sums of magnitudes, not to a result in which they
    # may cancel.
    inputs = torch.randn(lora_A.shape[1], _PROBES, generator=torch.Generator().manual_seed(0))
    computed = scale * (lora_B.float() @ (lora_A.float() @ inputs)).double()
    exact_A, exact_B = correction.lora_A.cpu().double(), correction.lora_B.cpu().double()
    rounding = _ROUNDING + (4 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    limit = rounding * (exact_B.abs() @ (exact_A.abs() @ inputs.abs().double())).norm()
    if not (computed - exact_B @ (exact_A @ inputs.double())).norm() <= limit:
        raise NumericalError(
            f"The adapter of {name}, scaled by {scale:g}, is not the correction that was found: it overflows or "
            "vanishes in float32. Try a lora_alpha near the rank."
        )
