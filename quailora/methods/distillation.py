"""Distillation of a whole model into its adapter: a short training after the closed form."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.capture import arithmetic
from ..calibration.gradients import frozen
from ..calibration.sources import CalibrationSource
from ..calibration.windows import CalibrationDtype
from ..errors import ConfigurationError, NumericalError, check_choice
from ..families import Correction
from ..models.layers import Layer
from ..models.weights import beside, replaced
from ..support.progress import counting

logger = logging.getLogger("quailora")

_SAVED_SECONDS = 120.0  # between two times that an unfinished training is kept; results do not depend on it

Save = Callable[[Mapping[str, Tensor]], None]
"""Keeps an unfinished training, in place of what was kept before. The next step changes the tensors."""


@final
@dataclass(frozen=True)
class Distillation:
    """Trains the factors so that the quantized model predicts what full precision does (RILQ's idea).

    Minimises the mean over tokens of `KL(p || q)` from the full-precision distribution `p`, by AdamW with a rate that
    falls to zero. The base stays as it is. To compare, the text itself can be the target: plain fine-tuning.

    Attributes:
        steps: updates.
        batch: windows a step.
        sequence_length: tokens in a window.
        learning_rate: learning rate of the first step.
        target: "full precision", or the next token of the "text".
    """

    steps: int = 60
    batch: int = 2
    sequence_length: int = 512
    learning_rate: float = 3e-4
    target: Literal["full precision", "text"] = "full precision"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.sequence_length < 2:
            raise ConfigurationError(
                f"Expected at least one step of one window of two tokens, got {self.steps} steps of {self.batch} x "
                f"{self.sequence_length}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"Expected a learning rate above 0, got {self.learning_rate}.")
        check_choice("a target", self.target, ("full precision", "text"))

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.sequence_length

    def fitted(self, longest: int) -> Distillation:
        """Return the same distillation on windows that are no longer than those of the calibration."""
        return replace(self, sequence_length=min(self.sequence_length, longest))

    def asked(
        self, steps: int | None, tokens: int | None, learning_rate: float | None, longest: int | None = None
    ) -> Distillation | None:
        """Return the same distillation with other settings, where they are not None; None if there are to be no steps.

        Args:
            steps: updates.
            tokens: tokens in a step, of which there are as many as whole windows fill, and at least one window.
            learning_rate: learning rate of the first step.
            longest: tokens in a window of the calibration, if that is known.

        Raises:
            ConfigurationError: if a setting is out of range.
        """
        # Windows keep their length, unless a step is to have fewer tokens than one of them.
        if steps == 0:
            return None
        if tokens is not None and tokens < 2:
            raise ConfigurationError(f"Expected at least two tokens in a step of the distillation, got {tokens}.")
        most = self.sequence_length if longest is None else min(self.sequence_length, longest)
        length = self.sequence_length if tokens is None else min(tokens, most)
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            batch=self.batch if tokens is None else tokens // length,
            sequence_length=length,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
        )

    def windows(self, calibration: CalibrationSource, tokenizer: Any) -> Int[Tensor, "samples sequence_length"]:
        """Return the windows to train on, `batch` for each step.

        They are of the same text, no longer than those of calibration, and drawn with another seed; a short text is
        gone through several times.
        """
        return calibration.training_windows(tokenizer, self.steps * self.batch, self.sequence_length)

    def train(
        self,
        model: Any,
        layers: Mapping[str, Layer],
        quantized: Mapping[str, Tensor],
        corrections: Mapping[str, Correction],
        windows: Int[Tensor, "samples sequence_length"],
        dtype: CalibrationDtype = "auto",
        earlier: Mapping[str, Tensor] | None = None,
        save: Save | None = None,
    ) -> dict[str, Correction]:
        """Return the trained corrections.

        Args:
            model: a transformers causal language model in full precision, in memory; it is left as it was.
            layers: its linear layers, no fused experts among them.
            quantized: `Q` of each layer.
            corrections: the adapters to start from, before PEFT's scaling.
            windows: token ids, `batch` for each step.
            dtype: arithmetic, see `Calibration`.
            earlier: what `save` was called with last, in the same training, which then goes on from there. On a CPU the
                result is the same, bit by bit, as that of a training that was not interrupted.
            save: called every two minutes.

        Raises:
            NumericalError: if the loss is NaN or infinite.
        """
        device = next(model.parameters()).device
        trained = {name: trainable(correction, device) for name, correction in corrections.items()}
        # Only the adapters are trained, in float32. They enter the graph by hooks, and the quantized weights stand in
        # the place of the model's own, so that the model needs no change and no copy.
        parameters = [tensor for one in trained.values() for tensor in one.parameters.values() if tensor.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate)
        losses = _restore(optimizer, parameters, earlier) if earlier else []
        quantized, saved = beside(layers, quantized), time.monotonic()
        batches = torch.split(windows.to(device), self.batch)
        with counting("Distilling", len(batches), len(losses)) as counter:
            for ids in batches[len(losses) :]:
                if save is not None and losses and time.monotonic() - saved > _SAVED_SECONDS:
                    save(_state(optimizer, parameters, losses))
                    saved = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * (1 - len(losses) / len(batches))
                expected = self._expected(model, ids, dtype)
                with frozen(model), torch.enable_grad(), replaced(layers, quantized):
                    with corrected(layers, trained, quantized), arithmetic(model, dtype):
                        logits = model(input_ids=ids, use_cache=False).logits
                    loss = (
                        next_token_loss(logits, ids) if expected is None else divergence(expected, logits.flatten(0, 1))
                    )
                    torch.autograd.backward(loss)  # inside, where the weights that it needs are in place
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise NumericalError(f"The loss of step {len(losses)} is {losses[-1]}. Lower the learning rate.")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                counter.advance()
        logger.info("Loss of the training: %.4f nats a token at first, %.4f at last.", losses[0], losses[-1])
        return {name: detached(correction) for name, correction in trained.items()}

    @torch.no_grad()
    def _expected(
        self, model: Any, ids: Int[Tensor, "batch tokens"], dtype: CalibrationDtype
    ) -> Float[Tensor, "all_tokens vocabulary"] | None:
        """Return the logits to come close to, if the target is not the text."""
        if self.target == "text":
            return None
        with arithmetic(model, dtype):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, 1)


def _state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], losses: Sequence[float]
) -> dict[str, Tensor]:
    """Return a training as it is between two steps: the losses of those that are done, parameters and moments."""
    found = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, parameter in enumerate(parameters):
        found[f"{number}.parameter"] = parameter.detach()
        found |= {f"{number}.{name}": tensor for name, tensor in optimizer.state[parameter].items()}
    return found


def _restore(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], state: Mapping[str, Tensor]
) -> list[float]:
    """Put parameters and moments back, and return the losses of the steps that are done."""
    moments: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(parameters))}
    for key, tensor in state.items():
        number, _, name = key.partition(".")
        if name == "parameter":
            with torch.no_grad():
                parameters[int(number)].copy_(tensor)
        elif name:
            moments[int(number)][name] = tensor.clone()  # which may be mapped from a file that another one replaces
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    done: list[float] = state["losses"].tolist()
    return done


def next_token_loss(logits: Float[Tensor, "batch tokens vocabulary"], ids: Int[Tensor, "batch tokens"]) -> Tensor:
    """Return the mean negative log likelihood of each token but the first of each window, in nats; differentiable."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trainable(correction: Correction, device: torch.device) -> Correction:
    """Return a copy in float32 whose trained tensors collect gradients."""
    copies = {
        name: tensor.detach().to(device, torch.float32, copy=True).requires_grad_()
        if name not in correction.family.untrained
        else tensor.to(device)
        for name, tensor in correction.parameters.items()
    }
    return replace(correction, parameters=copies)


def detached(correction: Correction) -> Correction:
    """Return a correction whose tensors collect no gradients."""
    return replace(correction, parameters={name: tensor.detach() for name, tensor in correction.parameters.items()})


@contextmanager
def corrected(
    layers: Mapping[str, Layer], corrections: Mapping[str, Correction], quantized: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add what adapters add to the outputs of linear layers inside a `with` statement.

    Args:
        layers: the layers.
        corrections: the adapters.
        quantized: `Q` of each layer.
    """
    with ExitStack() as hooks:
        for name, correction in corrections.items():
            hooks.enter_context(layers[name].module.register_forward_hook(_adding(correction, quantized[name])))
        yield


def _adding(correction: Correction, quantized: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In float32 whatever the model computes in.
        added = correction.family.output(correction.parameters, inputs[0].float(), quantized)
        return output + added.to(output.dtype)

    return hook


def divergence(expected: Float[Tensor, "tokens vocabulary"], predicted: Float[Tensor, "tokens vocabulary"]) -> Tensor:
    """Return the mean over tokens of `KL(p || q)`, in nats, of distributions given by their logits; differentiable."""
    # The gradient of KL(p || q) with respect to the logits of q is q - p for each token, bounded by 1 however far apart
    # they are. It pulls every probability towards that of full precision, not only the one of the token that follows.
    log_p, log_q = (functional.log_softmax(logits.float(), dim=-1) for logits in (expected, predicted))
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
