"""Ranks and alphas as PEFT has them, and the factors of fused experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ..core.objective import Factors
from ..errors import ConfigurationError
from ..families import Lora
from ..families.adapter import PeftAdapter
from ..families.lora import divided_factors
from ..models.layers import Layer

PREFIX = "base_model.model."
"""Stands before a module's name in an adapter file."""

INNER = ".base_layer"
"""Stands behind it once for each wrapper around the parameter of fused experts; see `ExpertStack`."""


_EXTREME = 1e6  # of lora_alpha; float32 has room for far more, training has not


@final
@dataclass(frozen=True)
class LoraScaling:
    """How PEFT scales each layer: `W x + s * lora_B @ lora_A x`.

    Patterns are PEFT's: their keys are module names, their endings at a dot, or regular expressions for an ending.

    Attributes:
        rank: rank of every layer that no pattern names.
        alpha: `lora_alpha` of every layer that no pattern names; the rank if None, so that `s = 1`.
        rslora: `s = alpha / sqrt(rank)` instead of `alpha / rank` (Kalajdzievski, 2023, arXiv 2312.03732).
        rank_pattern: rank of the layers that a key names.
        alpha_pattern: `lora_alpha` of the layers that a key names.
    """

    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigurationError(f"Expected a rank of at least 1, got {rank}.")
        for alpha in (self.default_alpha, *self.alpha_pattern.values()):
            if not (alpha > 0 and math.isfinite(alpha)):
                raise ConfigurationError(f"Expected a positive lora_alpha, got {alpha}.")
            if not 1 / _EXTREME <= alpha <= _EXTREME:
                raise ConfigurationError(
                    f"Expected a lora_alpha between {1 / _EXTREME:g} and {_EXTREME:g}, got {alpha:g}. Factors that are "
                    "scaled by more overflow or vanish in float32. Values from 1 to some hundreds are common."
                )

    @property
    def default_alpha(self) -> float:
        """`lora_alpha` of every layer that no pattern names."""
        return float(self.rank if self.alpha is None else self.alpha)

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, name), self.rank)

    def alpha_of(self, name: str) -> float:
        """Return the `lora_alpha` of a layer."""
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, name), self.default_alpha)

    def scale_of(self, name: str, family: PeftAdapter = Lora()) -> float:  # noqa: B008 # frozen
        """Return `s`, the factor that PEFT multiplies `lora_B @ lora_A` of a layer with, or the change of a family."""
        return family.scale(self.alpha_of(name), self.rank_of(name), rslora=self.rslora)

    def alpha_for(self, rank: int, scale: float) -> float:
        """Return the `lora_alpha` that gives a layer of some rank the factor `s`."""
        return scale * (math.sqrt(rank) if self.rslora else rank)

    def as_config(self) -> dict[str, Any]:
        """Return what PEFT's `LoraConfig` says of ranks and alphas."""
        return {
            "r": self.rank,
            "lora_alpha": plain_number(self.default_alpha),
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: plain_number(alpha) for key, alpha in self.alpha_pattern.items()},
        }

    def unused_patterns(self, names: Iterable[str]) -> list[str]:
        """Return the keys of both patterns that mean none of these layers; PEFT ignores such keys."""
        used = {pattern_key(pattern, name) for name in names for pattern in (self.rank_pattern, self.alpha_pattern)}
        return [key for key in (*self.rank_pattern, *self.alpha_pattern) if key not in used]


def pattern_key(pattern: Mapping[str, object], name: str) -> str:
    """Return the first key of a pattern that means a layer, found by PEFT's own rule; the name itself if none does."""
    # PEFT matches a key as a regular expression for the end of a name. Its own function is asked, so that ranks here
    # are the ranks that PEFT will give.
    from peft.utils.other import get_pattern_key

    key: str = get_pattern_key(tuple(pattern), name)
    return key


def divided(factors: Factors, scale: float) -> Factors:
    """Return the factors of a correction as PEFT stores them, in float32 on the CPU.

    Args:
        factors: factors of the correction before PEFT's scaling.
        scale: what PEFT multiplies `lora_B @ lora_A` with; each factor is divided by its root, so they stay balanced.
            Directions that do nothing yet stay as they are.
    """
    named = {"lora_A.weight": factors.lora_A, "lora_B.weight": factors.lora_B}
    found = {name: tensor.cpu().contiguous() for name, tensor in divided_factors(named, scale).items()}
    return Factors(found["lora_B.weight"], found["lora_A.weight"])


@final
@dataclass(frozen=True)
class ExpertStack:
    """The corrections of all experts in one fused parameter, which PEFT keeps in one pair of factors.

    `lora_A` has the experts' rows one expert after the other; `lora_B` has the experts' columns interleaved. PEFT wraps
    the parameters of a module one around the other, the first one innermost.

    Attributes:
        parameter: name of the parameter.
        members: names of the layers, expert by expert.
        wrapped_by: how many targeted parameters of the same module come after this one.
    """

    parameter: str
    members: tuple[str, ...]
    wrapped_by: int

    @property
    def place(self) -> str:
        """What stands before `.lora_A.weight` in an adapter file."""
        return f"{PREFIX}{self.parameter.rpartition('.')[0]}{INNER * self.wrapped_by}"

    def tensors(self, factors: Sequence[Factors]) -> dict[str, Tensor]:
        """Return the two tensors of an adapter file from the factors of each member."""
        # PEFT takes lora_A as (experts, rank, in) and lora_B as (out, rank, experts), and multiplies for each expert e
        # lora_B[:, :, e] @ lora_A[e]. Flattened, the rows of lora_A stand expert after expert, and the columns of
        # lora_B count experts fastest.
        return {
            f"{self.place}.lora_A.weight": torch.cat([pair.lora_A for pair in factors]),
            f"{self.place}.lora_B.weight": torch.stack([pair.lora_B for pair in factors], dim=-1).flatten(1),
        }

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Return the factors of each member from the tensors of an adapter file."""
        lora_A, lora_B = (tensors[f"{self.place}.{each}.weight"] for each in ("lora_A", "lora_B"))
        members = len(self.members)
        lora_A = lora_A.view(members, -1, lora_A.shape[1])
        lora_B = lora_B.view(len(lora_B), -1, members)
        return {name: Factors(lora_B[..., index], lora_A[index]) for index, name in enumerate(self.members)}


def expert_stacks(layers: Mapping[str, Layer]) -> list[ExpertStack]:
    """Return the fused parameters among the targets of an adapter."""
    members: dict[str, list[str]] = {}
    modules: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.expert is not None:
            if layer.group not in members:
                modules.setdefault(layer.group.rpartition(".")[0], []).append(layer.group)
            members.setdefault(layer.group, []).append(name)
    return [
        ExpertStack(parameter, tuple(members[parameter]), len(parameters) - 1 - index)
        for parameters in modules.values()
        for index, parameter in enumerate(parameters)
    ]


def plain_number(value: float) -> int | float:
    """Return whole numbers as `int`, which PEFT's configuration expects."""
    return int(value) if float(value).is_integer() else value
