"""Train the codes and scales of a quantized model, one block after the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..calibration.activations import Activations
from ..calibration.blocks import Call, Chain, explained
from ..calibration.capture import arithmetic
from ..calibration.gradients import frozen
from ..calibration.held_out import trained_and_held_out
from ..calibration.sources import CalibrationSource
from ..calibration.windows import CalibrationDtype
from ..errors import ConfigurationError, NumericalError
from ..models.layers import Layer
from ..models.weights import execution_device, replaced, resident
from ..quantizers import QuantizedWeight
from ..support.progress import console, track
from .trained_codes import TrainedCodes, computing_with

logger = logging.getLogger("quailora")

_HELD_OUT = 32  # windows that tell whether the training of a block has helped

Weights = Mapping[str, QuantizedWeight]


@final
@dataclass(frozen=True)
class BlockTraining:
    """Settings of a training of codes and scales, one block of the model after the other.

    All layers of a block are trained together. Their block, on its inputs in the quantized model, is to return what the
    same block returns in the model that is aimed at: the loss is the squared norm of the error divided by that of the
    output, as the mean over tokens. Codes move as `TrainedCodes` says, and each scale is multiplied by a factor. AdamW
    trains both, with learning rates that fall to zero. A block whose training does not lower the loss on held-out
    windows keeps the codes and scales that it had.

    Training by blocks is due to Li et al. (2021, "BRECQ", arXiv 2102.05426); of language models, to Cheng et al. (2023,
    "AutoRound", arXiv 2309.05516) and Chen et al. (2024, "EfficientQAT", arXiv 2407.11062).

    Attributes:
        steps: updates of each block; 0 trains nothing.
        tokens: tokens in a step, as whole windows.
        windows: windows to train on, which are gone through several times.
        sequence_length: tokens in a window; those of the calibration where they are fewer.
        code_rate: learning rate of the first step for the places of codes, 1 being the way from one level to the next.
        scale_rate: learning rate of the first step for the factors of scales.
        seed: seed of the order of the windows.
    """

    steps: int = 200
    tokens: int = 1024
    windows: int = 256
    sequence_length: int = 512
    code_rate: float = 0.02
    scale_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.windows < 1 or self.tokens < 2 or self.sequence_length < 2:
            raise ConfigurationError(f"Expected windows and steps of at least two tokens, got {self!r}.")
        if not all(0 < rate < math.inf for rate in (self.code_rate, self.scale_rate)):
            raise ConfigurationError(f"Expected learning rates above 0, got {self!r}.")

    def drawn(
        self, source: CalibrationSource, tokenizer: Any
    ) -> tuple[Int[Tensor, "trained sequence_length"], Int[Tensor, "held_out sequence_length"]]:
        """Return the windows to train on, each of them once, and those that are held out.

        Raises:
            CalibrationError: if the text has only one window.
        """
        trained, held_out = trained_and_held_out(source, tokenizer, self.windows, _HELD_OUT, self.sequence_length)
        return torch.unique(trained, dim=0), held_out

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
        walk = _Walk(chain, layers, dtype, Activations(folder))
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
                    own = self._trained(walk, index, own, trained, others)
                    if on_block is not None:
                        on_block(own)
                if index + 1 < len(chain.blocks):
                    walk.advance(index, "quantized", own)
            walk.activations.drop(index)
            result |= own
        return result

    def _trained(
        self, walk: _Walk, index: int, weights: Weights, trained: Sequence[int], others: Sequence[int]
    ) -> Weights:
        """Return the weights of one block, trained, or as they were if that is no better."""
        # The aim is the output on the inputs of the model that is aimed at, so that a block also makes up for what is
        # left of the errors of the blocks before it, as far as its codes allow.
        codes = {name: TrainedCodes(weight, walk.layers[name].weight) for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(
            [
                {"params": [one.places for one in codes.values()], "lr": self.code_rate},
                {"params": [one.changes for one in codes.values()], "lr": self.scale_rate},
            ],
            betas=(0.9, 0.95),
            eps=1e-15,  # gradients are smaller the larger the model
            weight_decay=0.0,
        )
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        for batch in _in_random_order(trained, self.steps, self.seed + index):
            with torch.enable_grad(), computing_with(walk.layers, codes):
                loss = walk.loss(index, batch)
                torch.autograd.backward(loss)
            if not math.isfinite(loss.item()):
                raise NumericalError(
                    f"The loss of the training of {walk.chain.names[index]} is {loss.item()}. Lower its learning rates."
                )
            for one in codes.values():
                one.pass_gradient_on()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            for one in codes.values():
                one.follow()
        # Compared are weights as they are stored, whose scales are rounded to the format's precision.
        found = {name: one.weight() for name, one in codes.items()}
        before, after = (walk.mean_loss(index, one, others) for one in (weights, found))
        if not console.is_terminal:  # where nobody sees a progress bar
            logger.info(
                "%s: error of its outputs on held-out text %.5f before training, %.5f after.",
                walk.chain.names[index], before, after,
            )  # fmt: skip
        return found if after < before else weights


@dataclass(frozen=True, eq=False)
class _Walk:
    """Hidden states of two models, the one that is aimed at and the quantized one, from block to block.

    Attributes:
        chain: the blocks of the model.
        layers: its linear layers.
        dtype: arithmetic, see `Calibration`.
        activations: the hidden states, of both models and of two blocks at a time.
        calls: the calls of all blocks for each batch.
        rows: number of windows in each batch.
    """

    chain: Chain
    layers: Mapping[str, Layer]
    dtype: CalibrationDtype
    activations: Activations
    calls: dict[int, list[Call]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    @torch.no_grad()
    def begin(self, batches: Sequence[Int[Tensor, "_ sequence_length"]]) -> None:
        """Compute the inputs of the first block."""
        for number, ids in enumerate(batches):
            self.rows[number] = len(ids)
            with arithmetic(self.chain.model, self.dtype), explained(self.chain.model):
                hidden, self.calls[number] = self.chain.record(ids)
            for network in ("full", "quantized"):
                self.activations.save(0, network, number, hidden.cpu())

    @torch.no_grad()
    def advance(self, index: int, network: str, weights: Weights) -> None:
        """Compute the inputs of the next block in one of the two models."""
        with self._computing_with(weights):
            for number in self.calls:
                self.activations.save(index + 1, network, number, self._output(index, network, number).cpu())

    @torch.no_grad()
    def mean_loss(self, index: int, weights: Weights, batches: Sequence[int]) -> float:
        """Return the mean loss of some batches with quantized weights in the block."""
        with self._computing_with(weights):
            total = sum(self.loss(index, number).item() * self.rows[number] for number in batches)
            return total / sum(self.rows[number] for number in batches)

    def loss(self, index: int, number: int) -> Float[Tensor, ""]:
        """Return the mean over tokens of the squared error of the outputs, relative to the aim's squared norm."""
        # Some tokens have hidden states a thousand times as large as others, the first one above all, and what follows
        # divides each token's states by their size. Errors of all tokens count alike once they are relative to it.
        found = self._output(index, "quantized", number).float()
        aim = self.activations.load(index + 1, "full", number, found.device).float()
        return ((found - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=torch.finfo(aim.dtype).tiny)).mean()

    def _output(self, index: int, network: str, number: int) -> Tensor:
        hidden = self.activations.load(index, network, number, execution_device(self.chain.model))
        with explained(self.chain.model), arithmetic(self.chain.model, self.dtype):
            return self.chain.run(index, self.calls[number][index], hidden)

    def _computing_with(self, weights: Weights) -> Any:
        return replaced(self.layers, {name: weight.dequantize() for name, weight in weights.items()})


def _in_random_order(batches: Sequence[int], steps: int, seed: int) -> Iterator[int]:
    """Yield a batch for each step; all of them come once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randperm, len(batches), generator=generator)
    rounds = torch.cat([draw() for _ in range(-(-steps // len(batches)))])
    yield from (batches[int(number)] for number in rounds[:steps])
