"""What PEFT computes with an adapter, and how its files hold it: all of a family but the fit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..core.objective import Factors
from ..errors import ConfigurationError, TargetError

Parameters = Mapping[str, Tensor]
"""Tensors of one layer's adapter, before PEFT's scaling, by the ends of their names in PEFT's files."""


class Change(NamedTuple):
    """What an adapter adds to the output of its layer: `weight @ x + bias`.

    Attributes:
        weight: the correction `C`, dense; a single zero of shape (1, 1) where the weight stays as it is.
        bias: what is added to every token; None for nothing.
    """

    weight: Float[Tensor, "out_features in_features"]
    bias: Float[Tensor, " out_features"] | None = None


class PeftAdapter(ABC):
    """A kind of adapter of PEFT: its tensors, what its layers compute with them, and its configuration.

    What a family adds to it is the choice of the tensors; see `Family`.
    """

    name: ClassVar[str] = ""
    """PEFT's name in lower case; the name on the command line and in files. Other classes go by their import path."""
    peft_type: ClassVar[str]
    """PEFT's name of the method, such as LORA."""
    default_rank: ClassVar[int | None] = None
    """PEFT's default of the size that `rank` means for this family; None if it has no such size."""
    scales: ClassVar[bool] = False
    """Whether PEFT multiplies the change of the weight by a factor that follows from `lora_alpha`."""
    has_rslora: ClassVar[bool] = False
    """Whether PEFT can divide the scaling by the root of the rank in place of the rank."""
    has_patterns: ClassVar[bool] = False
    """Whether PEFT takes another rank for single layers."""
    needs_base: ClassVar[bool] = False
    """Whether the change depends on the quantized weight `Q`."""
    needs_mean: ClassVar[bool] = False
    """Whether the family has a bias, for which the mean of the inputs is needed."""
    linear: ClassVar[bool] = False
    """Whether the change is linear in the tensors that are trained: what training adds is then an adapter of this kind,
    too, with the same settings."""
    runs_empty: ClassVar[bool] = True
    """Whether PEFT's layer runs on tensors without data, so that a model can be tried before its weights are loaded."""
    nested: ClassVar[bool] = False
    """Whether a larger size can do all that a smaller one can, so that the error does not rise with the size."""
    stationary: ClassVar[bool] = False
    """Whether the gradient of the error is zero at the solution, as at a minimum that is found exactly."""
    moves_bias: ClassVar[bool] = False
    """Whether PEFT also changes a bias that the layer itself has, which no fit here sees; such layers are refused."""
    untrained: ClassVar[frozenset[str]] = frozenset()
    """Tensors in the file that training leaves as they are, such as indices."""
    start_fields: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    """Fields of PEFT's configuration that say how an adapter starts, and nothing of what it computes."""
    bases: ClassVar[frozenset[str]] = frozenset({"float", "nf4", "int8"})
    """The bases that stock PEFT computes this family on, of float, nf4, int8, gptq, awq, hqq and torchao."""

    @property
    def title(self) -> str:
        """What messages and tables call the family: its name, or that of the class where it has none."""
        return self.name or type(self).__name__

    @abstractmethod
    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a layer, by the end of its name in PEFT's files.

        Args:
            shape: `(out_features, in_features)` of the layer.
            rank: size of the adapter; without meaning for families that have none.

        Raises:
            TargetError: if the layer cannot carry an adapter of this size.
        """

    @abstractmethod
    def change(self, parameters: Parameters, base: Tensor | None = None) -> Change:
        """Return what PEFT's layer adds to its output, before PEFT's scaling; differentiable.

        Args:
            parameters: the parameters of one layer.
            base: `Q`. Families that do not need it read its shape at most; then it may be without data.
        """

    def output(
        self, parameters: Parameters, inputs: Float[Tensor, "*batch in_features"], base: Tensor | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        """Return what PEFT's layer adds to its output for some inputs; differentiable, see `change`."""
        weight, bias = self.change(parameters, base)
        if bias is not None and weight.numel() == 1:
            return bias.expand(*inputs.shape[:-1], len(bias))
        added = functional.linear(inputs, weight)
        return added if bias is None else added + bias

    @abstractmethod
    def config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of PEFT's configuration that belong to this family.

        Args:
            sizes: ranks and alphas in the words of PEFT's `LoraConfig`: `r`, `lora_alpha`, `use_rslora`,
                `rank_pattern` and `alpha_pattern`.
        """

    def identity(self, shape: tuple[int, int], rank: int, base: Tensor | None = None) -> Parameters | None:
        """Return parameters that change nothing and can be trained; None if the family has none.

        Args:
            shape: `(out_features, in_features)` of the layer.
            rank: size of the adapter.
            base: `Q`, for families that need it.
        """
        del base
        return {name: torch.zeros(size) for name, size in self.shapes(shape, rank).items()}

    def scale(self, alpha: float, rank: int, *, rslora: bool = False) -> float:
        """Return the factor that PEFT multiplies the change with; 1 for families without one."""
        del alpha, rank, rslora
        return 1.0

    def stored(self, parameters: Parameters, scale: float) -> Parameters:
        """Return the parameters as PEFT's file has them: with them PEFT computes `change`, times `scale`.

        Args:
            parameters: the parameters before PEFT's scaling.
            scale: what PEFT multiplies the change by.
        """
        if scale != 1:
            raise ConfigurationError(f"PEFT does not scale {self.title}, got a factor of {scale:g}.")
        return parameters

    def shared(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> Parameters:
        """Return tensors that all layers share, by their full names in the file; none by default.

        Args:
            shapes: `(out_features, in_features)` of each layer.
            rank: size of the adapter.
        """
        del shapes, rank
        return {}

    def shared_numbers(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
        """Return how many numbers all layers share; see `shared`."""
        return sum(tensor.numel() for tensor in self.shared(shapes, rank).values())

    def count(self, shape: tuple[int, int], rank: int) -> int:
        """Return how many numbers of a layer are trained."""
        shapes = self.shapes(shape, rank)
        return sum(math.prod(size) for name, size in shapes.items() if name not in self.untrained)

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        """Return how many numbers of a layer are in the file, each of four bytes."""
        return sum(math.prod(size) for size in self.shapes(shape, rank).values())

    def layer_bytes(self, shape: tuple[int, int], rank: int, number_bytes: int = 4) -> int:
        """Return the bytes of a layer in the file; tensors that are not trained, such as indices, keep four a number.

        Args:
            shape: `(out_features, in_features)` of the layer.
            rank: size of the adapter.
            number_bytes: bytes of a number that is trained.
        """
        trained = self.count(shape, rank)
        return number_bytes * trained + 4 * (self.numbers(shape, rank) - trained)


@final
@dataclass(frozen=True, eq=False)
class Correction:
    """The adapter of one layer.

    Attributes:
        family: how the parameters make a change of the layer's output.
        parameters: tensors by the ends of their names in PEFT's files, before PEFT's scaling.
        shape: `(out_features, in_features)` of the layer.
        energies: energy of each direction of a low-rank correction, see `LowRank`; None for other families.
    """

    family: PeftAdapter
    parameters: Parameters
    shape: tuple[int, int]
    energies: Float[Tensor, " rank"] | None = None

    def change(self, base: Tensor | None = None) -> Change:
        """Return what the adapter adds to the layer's output; see `Family.change`."""
        return self.family.change(self.parameters, torch.empty(self.shape, device="meta") if base is None else base)

    def to(self, device: torch.device | str) -> Correction:
        """Return the adapter on a device."""
        return replace(self, parameters={name: tensor.to(device) for name, tensor in self.parameters.items()})

    def dense(self, base: Tensor | None = None) -> Float[Tensor, "out_features in_features"]:
        """Return the correction `C` of the weight, without a bias."""
        return self.change(base).weight

    @property
    def factors(self) -> Factors:
        """Both factors of a correction by plain LoRA.

        Raises:
            ConfigurationError: if the adapter is of another family.
        """
        if self.family.name != "lora":
            raise ConfigurationError(f"Expected a correction by LoRA, which has two factors, got {self.family!r}.")
        return Factors(self.parameters["lora_B.weight"], self.parameters["lora_A.weight"])

    @property
    def lora_A(self) -> Float[Tensor, "rank in_features"]:  # noqa: N802
        """Right factor of a correction by plain LoRA."""
        return self.factors.lora_A

    @property
    def lora_B(self) -> Float[Tensor, "out_features rank"]:  # noqa: N802
        """Left factor of a correction by plain LoRA."""
        return self.factors.lora_B

    @property
    def rank(self) -> int:
        """Rank of a correction by plain LoRA, trainable directions included."""
        return len(self.factors.lora_A)


def check_rank_for(family: PeftAdapter, rank: int, limit: int, shape: tuple[int, int]) -> None:
    """Raise a `TargetError` unless a size is from 1 to a limit.

    Args:
        family: the family.
        rank: the size.
        limit: the largest that a layer of this shape can carry.
        shape: `(out_features, in_features)` of the layer.
    """
    if not 1 <= rank <= limit:
        raise TargetError(
            f"Expected a rank from 1 to {limit} for {family.title} in a layer of shape {shape}, got {rank}."
        )
