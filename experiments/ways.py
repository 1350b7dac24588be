"""Ways to train all factors of a start: how they are split before training, and how the optimizer moves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .protocol import Run

SLOW = 8.0  # by how much the rate of A is lower in the training "slow A"
SCALED = 6.0  # ratio of the entries of A to those of B, in the training "scaled"
_WINDOWS = 16  # training windows whose inputs are used in the training "input power"
DECAY = 10.0  # share of the way back to the start that a step goes, for each unit of the rate, in the training "decay"


def split(model: Any, arm: Arm, windows: Tensor) -> None:
    """Split the start of an arm into other factors A and B with the same product, if the arm does so.

    Args:
        model: a `PeftModel` with the start.
        arm: the arm.
        windows: token ids of the training, (batch, tokens), of which the first give the inputs of each layer.
    """
    if arm.training == "scaled":
        scale_factors(model, SCALED)
    elif arm.training == "input power":
        balance_by_inputs(model, windows[:_WINDOWS])


def adapted(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the modules of A and B of each layer."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield module.lora_A["default"], module.lora_B["default"]


@torch.no_grad()
def scale_factors(model: Any, ratio: float) -> None:
    """Scale A and B of each layer against each other, so that entries of A are `ratio` times as large as those of B."""
    for first, second in adapted(model):
        factor = (ratio**2 * second.weight.square().mean() / first.weight.square().mean()).pow(0.25)
        first.weight.mul_(factor)
        second.weight.div_(factor)


@torch.no_grad()
def balance_by_inputs(model: Any, windows: Tensor) -> None:
    """Split each start so that the mean of `A x x^T A^T` over the inputs x is diagonal, and equals `B^T B`.

    Split by weights alone, as starts come, `A A^T` equals `B^T B`.
    """
    moments = second_moments(model, windows)
    for first, second in adapted(model):
        values, vectors = torch.linalg.eigh(moments[first])
        powers = values.clamp_min(values[-1] * 1e-12).sqrt()
        left, gains, right = torch.linalg.svd(second.weight.double() @ (vectors * powers), full_matrices=False)
        change = gains.sqrt()[:, None] * right @ (vectors / powers).T
        first.weight.copy_(change @ first.weight.double())
        second.weight.copy_(left * gains.sqrt())


def second_moments(model: Any, windows: Tensor) -> dict[Any, Tensor]:
    """Return the mean of `A x x^T A^T` over the tokens of windows for each module of A, (rank, rank) in float64."""
    sums: dict[Any, Tensor] = {}

    def take(module: Any, _: Any, output: Tensor) -> None:
        reduced = output.detach().flatten(0, -2).double()
        sums[module] = sums.get(module, 0) + reduced.T @ reduced / windows.numel()

    handles = [first.register_forward_hook(take) for first, _ in adapted(model)]
    for window in windows.to(model.device):
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def optimizer_of(model: Any, run: Run, arm: Arm) -> torch.optim.Optimizer:
    """Return AdamW without decay towards zero over the trained factors."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    slow = SLOW if arm.training == "slow A" else 1.0
    groups = [
        {"params": [weight for name, weight in trained if "lora_A" in name], "lr": run.rate / slow},
        {"params": [weight for name, weight in trained if "lora_A" not in name], "lr": run.rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, weight_decay=0.0)
    if arm.training == "decay":
        decay_to_start(optimizer)
    return optimizer


def decay_to_start(optimizer: torch.optim.Optimizer) -> None:
    """Let every step of an optimizer end with a decay of the weights towards what they are now."""
    starts = {weight: weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]}

    @torch.no_grad()
    def decay(*_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.lerp_(starts[weight], DECAY * group["lr"])

    optimizer.register_step_post_hook(decay)
