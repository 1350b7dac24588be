"""The jobs of `experiments/after.py`: which adapters are merged into what, and moved where."""

from __future__ import annotations

from dataclasses import replace

from quailora import GPTQ, HQQ, NF4, Int8, Quantizer, Uniform
from quailora.merging.training import MergeTraining

from .after_scores import STARTS
from .protocol import PROTOCOLS

FORMATS: dict[str, tuple[Quantizer, Quantizer]] = {"nf4": (NF4(), NF4()), "gptq": (GPTQ(), Uniform())}
"""What adapters are merged into, and rounding to nearest in the same format."""

BASES: dict[str, Quantizer] = {"gptq4": GPTQ(), "gptq3": GPTQ(bits=3), "hqq4": HQQ(), "int8": Int8()}
"""What adapters are moved to."""

RANKS = (16, 32)

_NONE, _WHOLE = MergeTraining.none(), MergeTraining()

PARTS = {
    "none": _NONE,
    "blocks": replace(_NONE, blocks=_WHOLE.blocks),
    "scales": replace(_NONE, scales=_WHOLE.scales),
    "longer": replace(_WHOLE, blocks=replace(_WHOLE.blocks, steps=400, windows=512)),
}
"""Parts of the training of a merged model, of blocks and of all scales together, and twice as much of the former: what
each is worth."""


def jobs() -> list[str]:
    """Return the names of all jobs, most important first."""
    seeds = PROTOCOLS["reference"].seeds
    adapters = [f"{arm}/{seed}" for seed in seeds for arm in reversed(STARTS)]
    merges = [f"merge/{one}/{name}/trained" for one in adapters for name in FORMATS]
    return [
        *merges,
        *(f"part/best/0/{name}/{part}" for name in FORMATS for part in ("none", "blocks", "scales")),
        *(f"part/best/{seed}/gptq/longer" for seed in seeds),
        *(f"mixed/{one}/gptq" for one in adapters),
        *(f"start/{name}" for name in BASES),
        *(f"again/{name}/{seed}" for seed in seeds for name in BASES),
        *(f"start/{name}/32" for name in BASES),
        *(f"rebase/best/{seed}/{name}/{rank}" for seed in seeds for rank in RANKS for name in BASES),
        *(f"reference/{one}" for one in adapters),
        *(f"gptqmodel/{one}" for one in adapters),
        *(f"merge/{one}/nf4/full" for one in adapters),
        *(f"rebase/{arm}/{seed}/{name}/32" for seed in seeds for arm in ("qlora", "quailora") for name in BASES),
    ]
