"""The configuration of a checkpoint in AutoGPTQ's format, found from the tensors of its layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..quantizers.packing import pack_words, unpack_words


@final
@dataclass(frozen=True)
class GroupedLayer:
    """How one layer is quantized.

    Attributes:
        bits: width of a code.
        columns: inputs of the layer.
        group_size: columns that share a scale; None if all of them do.
        ordered: whether the columns of a group follow each other.
        symmetric: whether every zero point is in the middle.
        lowest: the smallest zero point.
    """

    bits: int
    columns: int
    group_size: int | None
    ordered: bool
    symmetric: bool
    lowest: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> GroupedLayer:
        """Return how a layer is quantized, from the tensors of `QuantizedWeight.packed`."""
        # Everything follows from the tensors, so that a base which another package has made is described as well as one
        # of ours. The width of a code is told by how many words of 32 bits hold those of a column.
        groups = tensors["g_idx"]
        bits = bits_of(tensors)
        zeros = unpack_words(tensors["qzeros"], bits)
        return cls(
            bits,
            len(groups),
            int(groups.bincount().max()) if groups.any() else None,
            bool((groups.diff() >= 0).all()),
            bool((zeros == 2 ** (bits - 1)).all()),
            int(zeros.min()),
        )

    def fits(self, bits: int, group_size: int) -> bool:
        """Return whether a configuration of all layers, with -1 for one group a row, holds for this one."""
        size = self.group_size
        return self.bits == bits and (
            group_size in (-1, self.columns) or group_size > self.columns if size is None else size == group_size
        )


def bits_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the width of the codes of a layer."""
    return len(tensors["qweight"]) * 32 // len(tensors["g_idx"])


def gptq_config(packed: Mapping[str, Mapping[str, Tensor]], kept: Iterable[str] = ()) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint in AutoGPTQ's format.

    Its first version, "gptq", which everything reads, stores zero points less one and has no place for zero; "gptq_v2"
    stores them as they are. Layers of other bits or groups than most, and layers in full precision, stand in `dynamic`,
    which gptqmodel and vLLM read.

    Args:
        packed: tensors of the quantized layers, by module name.
        kept: names of the linear layers that are left in full precision.
    """
    # One configuration stands for most layers, those of one group a row aside, for which any larger size holds, too.
    # `desc_act` is needed if any layer has its columns out of order, and `sym` holds only if every zero point of every
    # layer is in the middle.
    layers = {name: GroupedLayer.of(tensors) for name, tensors in packed.items()}
    counted = Counter(layer.bits for layer in layers.values())
    bits = max(counted, key=lambda one: (counted[one], one))
    sizes = Counter(layer.group_size for layer in layers.values() if layer.bits == bits and layer.group_size)
    size = max(sizes, key=lambda one: (sizes[one], one)) if sizes else -1
    dynamic: dict[str, dict[str, int]] = {
        pattern("+", name): {"bits": layer.bits, "group_size": layer.group_size or -1}
        for name, layer in layers.items()
        if not layer.fits(bits, size)
    }
    first_version = all(layer.lowest > 0 for layer in layers.values())
    symmetric = all(layer.symmetric for layer in layers.values())
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": not all(layer.ordered for layer in layers.values()),
        "sym": symmetric,
        # gptqmodel, which alone loads layers of different bits, reads the first version with stored zero points only
        # from checkpoints that it has written itself.
        "checkpoint_format": "gptq" if first_version and (symmetric or not dynamic) else "gptq_v2",
        "lm_head": False,
    }
    if kept and not dynamic:
        # transformers, which has one configuration for all layers, takes the names of the quantized ones from here.
        config["modules_in_block_to_quantize"] = [list(packed)]
    dynamic |= {pattern("-", name): {} for name in kept}
    return config | ({"dynamic": dynamic} if dynamic else {})


def pattern(sign: str, name: str) -> str:
    """Return the key of `dynamic` for one layer: "+" with settings of its own, "-" without quantization."""
    return f"{sign}:^{re.escape(name)}$"


def in_first_version(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer with zero points less one, as the first version of the format has them."""
    bits = bits_of(tensors)
    return dict(tensors) | {"qzeros": pack_words(unpack_words(tensors["qzeros"], bits) - 1, bits)}
