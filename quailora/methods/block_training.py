"""Train the codes and scales of a quantized model, and its adapter, one block after the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from ..calibration.activations import Activations
from ..calibration.blocks import Chain
from ..calibration.examples import BlockExamples
from ..calibration.gradients import frozen
from ..calibration.held_out import trained_and_held_out
from ..calibration.sources import CalibrationSource
from ..calibration.windows import CalibrationDtype, random_order
from ..errors import ConfigurationError, NumericalError
from ..families import Correction
from ..models.layers import Layer
from ..models.weights import replaced, resident
from ..quantizers import QuantizedWeight
from ..support.progress import track, watched
from .block_walk import BlockWalk
from .distillation import detached, trainable
from .trained_codes import TrainedCodes, computing_with

logger = logging.getLogger("quailora")

TRAINED_BYTES = 24
"""Bytes of a weight in training: its place, its number, a gradient, two moments of AdamW, and a product."""

ENOUGH_TOKENS = 2**16
"""Tokens of calibration with which blocks come out better on other text."""

_LARGE = 2.0**12  # factor of the loss, since numbers of float16 end at 6e-8; AdamW does the same whatever it is
_HELD_OUT = 32  # windows that tell whether the training of a block has helped

TrainedPart = Literal["codes", "scales", "factors"]
"""What can be trained."""

Weights = Mapping[str, QuantizedWeight]
Corrections = Mapping[str, Correction]


@final
@dataclass(frozen=True, eq=False)
class TrainedBlock:
    """What has become of one block; as it was before, if training did not help.

    Attributes:
        weights: the quantized weight of each layer.
        corrections: the adapters of its layers, before PEFT's scaling.
        before: loss on held-out examples before the training, see `BlockExamples.loss`.
        after: the same of what was found, kept or not.
    """

    weights: Weights
    corrections: Corrections
    before: float
    after: float


@final
@dataclass(frozen=True)
class BlockTraining:
    """Settings of a training of codes, scales and adapters, one block of the model after the other.

    All layers of a block are trained together. Their block, on its inputs in the quantized model, is to return what the
    same block returns in the model that is aimed at: the loss is the squared norm of the error divided by that of the
    output, as the mean over tokens. Codes move as `TrainedCodes` says, each scale is multiplied by a factor, and the
    numbers of an adapter are trained as they are. AdamW trains all of them, with learning rates that fall to zero. A
    block whose training does not lower the loss on held-out windows keeps what it had.

    Training by blocks is due to Li et al. (2021, "BRECQ", arXiv 2102.05426); of language models, to Cheng et al. (2023,
    "AutoRound", arXiv 2309.05516) and Chen et al. (2024, "EfficientQAT", arXiv 2407.11062).

    Attributes:
        steps: updates of each block; 0 trains nothing.
        tokens: tokens in a step, as whole windows.
        windows: windows to train on, which are gone through several times; `init` trains on those of the calibration.
        sequence_length: tokens in a window; those of the calibration where they are fewer.
        code_rate: learning rate of the first step for the places of codes, 1 being the way from one level to the next.
        scale_rate: learning rate of the first step for the factors of scales.
        factor_rate: learning rate of the first step for the numbers of adapters.
        parts: what is trained, of "codes", "scales" and "factors", which are the numbers of adapters.
        seed: seed of the order of the windows.
    """

    steps: int = 200
    tokens: int = 1024
    windows: int = 256
    sequence_length: int = 512
    code_rate: float = 0.02
    scale_rate: float = 2e-3
    factor_rate: float = 1e-3
    parts: tuple[TrainedPart, ...] = ("codes", "scales", "factors")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.windows < 1 or self.tokens < 2 or self.sequence_length < 2:
            raise ConfigurationError(f"Expected windows and steps of at least two tokens, got {self!r}.")
        if not all(0 < rate < math.inf for rate in (self.code_rate, self.scale_rate, self.factor_rate)):
            raise ConfigurationError(f"Expected learning rates above 0, got {self!r}.")
        if not self.parts or not set(self.parts) <= set(get_args(TrainedPart)):
            raise ConfigurationError(
                f"Expected some of {', '.join(get_args(TrainedPart))} as trained parts, got {', '.join(self.parts)!r}."
            )

    @property
    def changes_base(self) -> bool:
        """Whether codes or scales are trained."""
        return self.steps > 0 and self.parts != ("factors",)

    def drawn(
        self, source: CalibrationSource, tokenizer: Any
    ) -> tuple[Int[Tensor, "trained sequence_length"], Int[Tensor, "held_out sequence_length"]]:
        """Return the windows to train on, each of them once, and those that are held out.

        Raises:
            CalibrationError: if the text has only one window.
        """
        trained, held_out = trained_and_held_out(source, tokenizer, self.windows, _HELD_OUT, self.sequence_length)
        return torch.unique(trained, dim=0), held_out

    def improve(
        self,
        examples: BlockExamples,
        layers: Mapping[str, Layer],
        weights: Weights,
        corrections: Corrections = MappingProxyType({}),
    ) -> TrainedBlock:
        """Train one block, whose layers are in memory.

        Args:
            examples: its inputs, and the outputs to aim at.
            layers: its linear layers, which are left as they were.
            weights: the quantized weight of each layer.
            corrections: the adapters of some or all of them, before PEFT's scaling.

        Raises:
            NumericalError: if the loss is NaN or infinite.
            CalibrationError: if there is nothing to train on.
        """
        # The aim is the output on the inputs of the model that is aimed at, so that a block also makes up for what is
        # left of the errors of the blocks before it, as far as its codes and adapters allow.
        codes = {
            name: TrainedCodes(
                weight,
                aim_beside(layers[name].weight, weight, corrections.get(name)),
                codes="codes" in self.parts,
                scales="scales" in self.parts,
            )
            for name, weight in weights.items()
        }
        adapters = {name: trainable(one, layers[name].weight.device) for name, one in corrections.items()}
        numbers = [tensor for one in adapters.values() for tensor in one.parameters.values() if tensor.requires_grad]
        groups = [
            ([one.places for one in codes.values()], self.code_rate),
            ([one.changes for one in codes.values()], self.scale_rate),
            (numbers if "factors" in self.parts else [], self.factor_rate),
        ]
        # A format without scales, or a base that stays as it is beside layers without an adapter, has nothing to train.
        parameters = [tensor for tensors, _ in groups for tensor in tensors if tensor.numel()]
        examples.check()
        before = _held_out_loss(examples, layers, weights, corrections)
        if not parameters or not self.steps:
            return TrainedBlock(weights, corrections, before, before)
        optimizer = torch.optim.AdamW(
            [{"params": tensors, "lr": rate} for tensors, rate in groups],
            betas=(0.9, 0.95),
            eps=1e-15,  # gradients are smaller the larger the model
            weight_decay=0.0,
        )
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        for number in random_order(len(examples.trained), self.steps, self.seed + examples.index).tolist():
            with torch.enable_grad(), computing_with(layers, codes, adapters):
                loss = examples.loss(examples.trained[number])
                torch.autograd.backward(loss * _LARGE)
            if not math.isfinite(loss.item()):
                raise NumericalError(
                    f"The loss of the training of {examples.name} is {loss.item()}. Lower its learning rates."
                )
            for one in codes.values():
                one.pass_gradient_on()
            examples.average([tensor.grad for tensor in parameters])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            for one in codes.values():
                one.follow()
        # Compared are weights as they are stored, whose scales are rounded to the format's precision.
        found = {name: one.weight() for name, one in codes.items()}
        others = {name: detached(one) for name, one in adapters.items()}
        # All processes sum up their losses, so that they come to the same decision.
        after = _held_out_loss(examples, layers, found, others)
        if not watched():  # where nobody sees a progress bar
            logger.info(
                "%s: error of its outputs on held-out text %.5f before training, %.5f after.",
                examples.name, before, after,
            )  # fmt: skip
        kept = (found, others) if after < before else (weights, corrections)
        return TrainedBlock(*kept, before, after)

    def train(
        self,
        chain: Chain,
        layers: Mapping[str, Layer],
        weights: Weights,
        windows: Int[Tensor, "trained sequence_length"],
        held_out: Int[Tensor, "held_out sequence_length"],
        dtype: CalibrationDtype = "auto",
        earlier: Weights | None = None,
        on_block: Callable[[Weights], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, QuantizedWeight]:
        """Return the weights with trained codes and scales.

        Args:
            chain: the blocks of a model, see `find_chain`. Their outputs are the aim; they are left as they were.
            layers: linear layers of the model.
            weights: the quantized weight of each layer.
            windows: token ids of the windows to train on.
            held_out: token ids of the windows that decide whether a block keeps what it had.
            dtype: arithmetic, see `Calibration`.
            earlier: trained weights of an earlier run; blocks that it has finished are not trained again.
            on_block: called with the trained weights of each block that is not among these.
            folder: where hidden states wait between two blocks; in memory if None.

        Raises:
            NumericalError: if the loss is NaN or infinite.
        """
        length = windows.shape[1]
        rows = max(1, self.tokens // length)
        batches = [*torch.split(windows, rows), *torch.split(held_out, rows)]
        walk = BlockWalk(chain, layers, dtype, Activations(folder))
        walk.begin(batches)
        trained = range(-(-len(windows) // rows))
        others = range(len(trained), len(batches))
        result = dict(weights)
        for index in track(range(len(chain.blocks)), "Training blocks"):
            names = [name for name in weights if name.startswith(f"{chain.names[index]}.")]
            own: Weights = {name: weights[name] for name in names}
            with resident(chain.blocks[index]), frozen(chain.model):
                walk.advance(index, "full", {})
                if earlier is not None and all(name in earlier for name in names):
                    own = {name: earlier[name] for name in names}
                elif any(weight.code_count or weight.scale_count for weight in own.values()):
                    examples = walk.examples(index, trained, others)
                    own = self.improve(examples, {name: layers[name] for name in names}, own).weights
                    if on_block is not None:
                        on_block(own)
                if index + 1 < len(chain.blocks):
                    walk.advance(index, "quantized", own)
            walk.activations.drop(index)
            result |= own
        return result


def aim_beside(weight: Tensor, quantized: QuantizedWeight, correction: Correction | None) -> Tensor:
    """Return what a quantized weight comes close to: the weight of full precision, less the correction."""
    return weight if correction is None else weight.float() - _change(correction, quantized, weight.device)


def _change(correction: Correction, quantized: QuantizedWeight, device: torch.device) -> Tensor:
    """Return what an adapter adds to a quantized weight, float32, on a device."""
    # Layers come from the store of a run, which may keep them in the memory of the processor.
    change: Tensor = correction.to(device).change(quantized.dequantize().to(device)).weight.float()
    return change


def _held_out_loss(
    examples: BlockExamples, layers: Mapping[str, Layer], weights: Weights, corrections: Corrections
) -> float:
    """Return the loss on held-out examples with weights and adapters as they are stored."""
    values = {name: weight.dequantize().to(layers[name].weight.device) for name, weight in weights.items()}
    for name, correction in corrections.items():
        values[name] = values[name] + _change(correction, weights[name], values[name].device).to(values[name].dtype)
    with replaced(layers, values):
        return examples.mean_loss(examples.held_out)
