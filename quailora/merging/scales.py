"""Train the scales of a quantized model, so that its predictions come close to those of the model it was made from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..calibration.blocks import forward_replaced
from ..calibration.capture import arithmetic
from ..calibration.gradients import frozen
from ..calibration.held_out import trained_and_held_out
from ..calibration.sources import CalibrationSource
from ..calibration.windows import CalibrationDtype
from ..errors import ConfigurationError, NumericalError
from ..methods.distillation import divergence
from ..models.layers import Layer
from ..quantizers import QuantizedWeight
from ..support.progress import track, watched

logger = logging.getLogger("quailora")

_HELD_OUT = 4  # batches that tell whether the training has helped
_LOGGED = 20  # steps from one line of the log to the next


@final
@dataclass(frozen=True)
class ScaleTraining:
    """Settings of a training of scales; codes stay as they are, so that the format and its size do.

    Each scale is multiplied by a factor, which starts at 1. AdamW trains the factors to lower the divergence of the
    predictions of the quantized model from those of the model that it was made from, with a learning rate that falls to
    zero. The text is that of the calibration.

    Codes are not trained in this way but block by block, see `BlockTraining`: the predictions of a whole model say too
    little about each of them, and a model whose codes followed their gradients came out worse on held-out text.

    Attributes:
        steps: updates; 0 trains nothing.
        tokens: tokens in a step, as whole windows.
        sequence_length: tokens in a window; those of the calibration where they are fewer.
        learning_rate: learning rate of the first step, relative to a scale.
    """

    steps: int = 200
    tokens: int = 1024
    sequence_length: int = 512
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.steps < 0 or self.tokens < 2 or self.sequence_length < 2 or not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(
                f"Expected steps of at least two tokens and a positive learning rate, got {self!r}."
            )

    def windows(
        self, source: CalibrationSource, tokenizer: Any
    ) -> tuple[Int[Tensor, "trained sequence_length"], Int[Tensor, "held_out sequence_length"]]:
        """Return the windows of all steps, in order, and those that are held out: they are never trained on.

        Raises:
            CalibrationError: if the text has only one window.
        """
        length = min(self.sequence_length, source.size[1])
        rows = max(1, self.tokens // length)
        kept, held_out = trained_and_held_out(source, tokenizer, self.steps * rows, _HELD_OUT * rows, length)
        return kept.repeat(-(-self.steps * rows // len(kept)), 1)[: self.steps * rows], held_out

    def train(
        self,
        model: Any,
        layers: Mapping[str, Layer],
        weights: Mapping[str, QuantizedWeight],
        windows: Int[Tensor, "trained sequence_length"],
        held_out: Int[Tensor, "held_out sequence_length"],
        dtype: CalibrationDtype = "auto",
    ) -> dict[str, QuantizedWeight]:
        """Return the weights with trained scales; with their own scales if that is no better on held-out windows.

        Args:
            model: a transformers causal language model in memory, whose predictions are the aim; left as it was.
            layers: its linear layers.
            weights: the quantized weight of each layer.
            windows: token ids of the windows of all steps, in order, see `windows`.
            held_out: token ids of the held-out windows.
            dtype: arithmetic, see `Calibration`.

        Raises:
            NumericalError: if the loss is NaN or infinite.
        """
        # Only the scales are trained: they are one number in 64, and what is stored of them has room for any value,
        # while codes have 16. The model itself computes the aim, so its weights stay where they are.
        device = next(model.parameters()).device
        scaled = {name: weight for name, weight in weights.items() if weight.scale_count}
        if not scaled or not self.steps:
            return dict(weights)
        changes = {
            name: torch.zeros(one.scale_count, device=device, requires_grad=True) for name, one in scaled.items()
        }
        values = {name: weight.dequantize().to(device) for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(changes.values(), self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        batches = windows.to(device).chunk(self.steps)
        others = torch.split(held_out.to(device), len(batches[0]))

        def loss_of(ids: Tensor) -> Tensor:
            with torch.no_grad(), arithmetic(model, dtype):
                expected = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            with quantized(layers, scaled, values, changes), arithmetic(model, dtype):
                logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            return divergence(expected, logits)

        def held_out_loss() -> float:
            with torch.no_grad():
                return sum(loss_of(ids).item() * len(ids) for ids in others) / len(held_out)

        # The parameters of the model itself would collect gradients, as large as the model, for nothing.
        before = held_out_loss()
        with frozen(model):
            for ids in track(batches, "Training scales", total=len(batches)):
                with torch.enable_grad():
                    loss = loss_of(ids)
                    torch.autograd.backward(loss)
                if not math.isfinite(loss.item()):
                    raise NumericalError(
                        f"The loss of the training of scales is {loss.item()}. Lower its learning rate."
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                rate.step()
                if not watched() and rate.last_epoch % _LOGGED == 0:  # where nobody sees a progress bar
                    logger.info("Training scales: step %d of %d.", rate.last_epoch, self.steps)
        # Compared are weights as they are stored, whose scales are rounded to the format's precision.
        new = {name: weight.rescaled(1 + changes[name].detach().to("cpu")) for name, weight in scaled.items()}
        values |= {name: weight.dequantize().to(device) for name, weight in new.items()}
        for change in changes.values():
            change.detach().zero_()
        after = held_out_loss()
        logger.info("Divergence on held-out calibration text: %.4f nats a token before, %.4f after.", before, after)
        if not after < before:
            return dict(weights)
        return {**weights, **new}


@contextmanager
def quantized(
    layers: Mapping[str, Layer],
    weights: Mapping[str, QuantizedWeight],
    values: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
) -> Iterator[None]:
    """Let linear layers compute with rescaled weights inside a `with` statement; differentiable in the scales.

    Args:
        layers: the layers.
        weights: quantized weights of those whose scales change.
        values: the dequantized weight of each layer.
        changes: what is added to the factor 1 of each scale.
    """
    modules = [layers[name].module for name in values]
    functions = [
        Rescaled(module, weights.get(name), value, changes.get(name))
        for module, (name, value) in zip(modules, values.items(), strict=True)
    ]
    with forward_replaced(modules, functions):
        yield


@dataclass(frozen=True, eq=False)
class Rescaled:
    """The forward pass of a linear layer with rescaled weights, which are made again for the backward pass."""

    module: nn.Module
    weight: QuantizedWeight | None
    values: Tensor
    change: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        if self.change is None:
            return self._linear(inputs, None)
        # The product of values and factors is as large as the weight. It is not kept for the backward pass but made
        # again there, so that all layers together need the memory of one.
        found: Tensor = checkpoint(self._linear, inputs, self.change, use_reentrant=False)
        return found

    def _linear(self, inputs: Tensor, change: Tensor | None) -> Tensor:
        values = self.values
        if change is not None and self.weight is not None:
            values = values + values * self.weight.spread(change).to(values.dtype)
        bias: Any = getattr(self.module, "bias", None)
        return functional.linear(inputs, values.to(inputs.dtype), bias)
