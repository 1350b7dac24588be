"""What to do with each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

from ..adapters.lora import LoraScaling
from ..bases.existing import ExistingBase
from ..calibration.tokens import TOKENS_PER_PASS
from ..calibration.walk import InputsOf
from ..errors import ConfigurationError
from ..families import Family
from ..layer.asymmetric import STEP
from ..layer.initializer import Initializer
from ..models.layers import Layer
from ..quantizers import QuantizedWeight, Quantizer
from .block_training import BlockTraining
from .distillation import Distillation


@final
@dataclass(frozen=True)
class Method:
    """What to do with each layer of a model, and with the whole model afterwards.

    Attributes:
        initializer: quantizer, weighting, solver and schedule; its rank is replaced by the layer's own.
        scaling: rank of each layer.
        inputs: whose inputs layers are fitted to. "full": those of the full-precision model. "quantized": those of the
            network in which all layers before are quantized and corrected. "asymmetric": the layer gets the latter and
            is fitted to its full-precision output on the former.
        requested_quantizer: the quantizer that was asked for, if the quantizer of `initializer` is another one, which
            rounds to the same format with error feedback; None if it is the one that was asked for.
        distillation: training of all corrections together that follows, if any.
        step: share of the best step from `W` to the asymmetric target, from 0 to 1; see `initialize_asymmetric`.
        base: the base, if it is quantized already; the initializer then has no quantizer.
        recipe: name of the recipe that the method is; None for one that was put together by hand.
        frozen_rank: rank of the correction, where that is not all of the rank; the other directions start as in plain
            LoRA. None if all directions are the correction.
        blocks: training of the codes, scales and corrections of each block, before the next one is calibrated, if any.
        quantizers: quantizers of single layers by module name, in place of that of `initializer`; None for a layer that
            stays in full precision.
        budget: the file with the budget plan that quantizers and ranks come from, if any.
        planned: number of weights of each linear layer that a budget plan knows, by module name. A model with others is
            refused; empty without a plan.
    """

    initializer: Initializer
    scaling: LoraScaling
    inputs: InputsOf = "full"
    requested_quantizer: Quantizer | None = None
    distillation: Distillation | None = None
    step: float = STEP
    base: ExistingBase | None = None
    recipe: str | None = field(default=None, compare=False, repr=False)
    frozen_rank: int | None = None
    blocks: BlockTraining | None = None
    quantizers: Mapping[str, Quantizer | None] = field(default_factory=dict)
    budget: str | None = field(default=None, compare=False, repr=False)
    planned: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def quantizer(self) -> Quantizer | None:
        """What quantizes the base, but for the layers in `quantizers`; None if the base is quantized already."""
        return self.initializer.quantizer

    @property
    def every_quantizer(self) -> tuple[Quantizer, ...]:
        """All quantizers of the base, that of most layers first; none if the base is quantized already."""
        every = (self.quantizer, *self.quantizers.values())
        return tuple(dict.fromkeys(one for one in every if one is not None))

    @property
    def kept(self) -> frozenset[str]:
        """Names of the layers that stay in full precision."""
        return frozenset(name for name, quantizer in self.quantizers.items() if quantizer is None)

    def initializer_of(self, layer: Layer) -> Initializer:
        """Return the initializer with the rank and the quantizer of a layer that is quantized."""
        quantizer = self.quantizers.get(layer.name, self.quantizer)
        return replace(self.initializer, rank=self.rank_of(layer.group), quantizer=quantizer)

    def rank_of(self, group: str) -> int:
        """Return the rank of the correction of a layer, or of the layers of a fused parameter."""
        return self.scaling.rank_of(group) if self.frozen_rank is None else self.frozen_rank

    @property
    def family(self) -> Family:
        """The kind of adapter."""
        return self.initializer.adapter

    @property
    def changes_base(self) -> bool:
        """Whether the base is another one than the quantizer alone gives, so that it has to be saved."""
        # No quantizer of stock packages makes a base of several kinds of layers while it loads a model.
        chosen = self.initializer.schedule.changes_base or self.requested_quantizer is not None
        return chosen or self.trains_base or bool(self.quantizers)

    @property
    def trains_base(self) -> bool:
        """Whether codes or scales of the base are trained with the blocks of the model."""
        return self.blocks is not None and self.blocks.changes_base

    @property
    def is_trained(self) -> bool:
        """Whether corrections are trained after they were found layer by layer; their errors are those before."""
        return self.distillation is not None or self.blocks is not None

    @property
    def batch_tokens(self) -> int:
        """Tokens that the model is run on at once, but for sequences that are longer."""
        return TOKENS_PER_PASS if self.blocks is None else min(TOKENS_PER_PASS, self.blocks.tokens)

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the whole model are taken, which then has to fit into memory."""
        return self.distillation is not None or self.initializer.weighting.needs_gradients

    @property
    def needs_validation(self) -> bool:
        """Whether some calibration tokens are held out, to choose between targets and roundings."""
        return self.inputs == "asymmetric" or self.initializer.schedule.needs_validation

    def quantized(self, layer: Layer) -> QuantizedWeight | None:
        """Return the weight of a layer in a base that is quantized already; None if there is no such base.

        Raises:
            ModelError: if the base does not have the layer, or in another shape.
        """
        return None if self.base is None else self.base.weight_of(layer)

    def check(self) -> None:
        """Raise a `ConfigurationError` if the parts of the method do not go together."""
        initializer, schedule = self.initializer, self.initializer.schedule
        if (self.base is None) == (initializer.quantizer is None):
            came = "neither" if self.base is None else f"both {initializer.quantizer!r} and a base"
            raise ConfigurationError(
                f"Expected either a quantizer or a base that is quantized already, got {came}. Give the initializer a "
                "quantizer and leave `base` out, or give the method a `base` and the initializer None as quantizer."
            )
        if initializer.quantizer is None and self.quantizers:
            raise ConfigurationError(
                "The base is quantized already, so its layers cannot have quantizers of their own. Leave out "
                "`quantizers`."
            )
        for quantizer in self.every_quantizer:
            schedule.check(quantizer)
        if initializer.quantizer is None and schedule.changes_base:
            raise ConfigurationError(
                f"The base is quantized already, and {schedule!r} would quantize it again. Take a recipe that keeps "
                "the base, such as quailora or best."
            )
        check_family(self)
        if self.inputs == "asymmetric" and not initializer.weighting.keeps_correlations:
            raise ConfigurationError(
                "Asymmetric inputs need a metric that keeps the correlations between inputs, got "
                f"{initializer.weighting!r}. Take the metric gram or shrunk, or full inputs."
            )
        if self.blocks is not None:
            check_blocks(self, self.blocks)
        if schedule.needs_validation and self.inputs != "asymmetric":
            raise ConfigurationError(
                f"The schedule {schedule!r} needs held-out tokens, which only asymmetric inputs have, got "
                f"{self.inputs} inputs. Pass `inputs='asymmetric'`, or take another schedule."
            )


def with_feedback(quantizer: Quantizer | None) -> Quantizer:
    """Return the quantizer that rounds to the format of another one with error feedback.

    Raises:
        ConfigurationError: if there is none, or no quantizer because the base is quantized already.
    """
    chosen = None if quantizer is None else quantizer.with_feedback()
    if chosen is None:
        base_name = "a base that is quantized already" if quantizer is None else repr(quantizer)
        raise ConfigurationError(f"There is no rounding with error feedback for {base_name}; take NF4 or Uniform.")
    return chosen


def check_blocks(method: Method, blocks: BlockTraining) -> None:
    """Raise a `ConfigurationError` if the blocks of a model cannot be trained with a method."""
    if method.inputs != "asymmetric":
        raise ConfigurationError(
            "Blocks are trained on the inputs of the quantized model, towards the outputs of full precision, for which "
            f"inputs have to be asymmetric, got {method.inputs} inputs."
        )
    if method.base is not None and blocks.changes_base:
        raise ConfigurationError(
            f"The base is quantized already, and {blocks!r} would change it. Train nothing but the factors: "
            '`parts=("factors",)`.'
        )


def check_family(method: Method) -> None:
    """Raise a `ConfigurationError` if the family of a method cannot carry what the method asks for."""
    family, scaling = method.family, method.scaling
    title = family.title
    if family.needs_base and method.changes_base:
        raise ConfigurationError(
            f"The adapter {title} multiplies the quantized weight, so that the weight has to be chosen before it, and "
            f"{method.initializer.schedule!r} chooses both together. Take a recipe that keeps the base, such as best."
        )
    if family.needs_mean and method.inputs != "full":
        raise ConfigurationError(
            f"The adapter {title} has a bias, which needs full inputs, got {method.inputs} inputs. Take a recipe on "
            "full inputs, such as shrunk or qera-exact."
        )
    if family.name == "lora":
        return
    if method.frozen_rank is not None:
        raise ConfigurationError(
            f"Only directions of LoRA can be frozen, got the family {title}. Leave out `frozen_rank`."
        )
    if (scaling.alpha is not None or scaling.alpha_pattern) and not family.scales:
        raise ConfigurationError(f"PEFT has no lora_alpha for {title}. Leave out alpha and alpha_pattern.")
    if scaling.rslora and not family.has_rslora:
        raise ConfigurationError(f"PEFT has no rank-stabilised scaling for {title}. Leave out rslora.")
    if (scaling.rank_pattern or scaling.alpha_pattern) and not family.has_patterns:
        raise ConfigurationError(
            f"PEFT has one rank for all layers of {title}. Leave out rank_pattern and alpha_pattern."
        )
    if method.initializer.weighting.needs_gradients:
        raise ConfigurationError(
            f"The metric {method.initializer.weighting!r} weighs outputs, which works with LoRA only, got {title}. "
            "Take another metric or recipe."
        )
