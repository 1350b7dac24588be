"""Calibration that goes on during training, as a callback of transformers' trainer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from typing_extensions import override

from ..adapters.frozen import check_none_frozen
from ..adapters.wrapped import wrapped_layers
from ..core.objective import Factors
from ..errors import ConfigurationError
from ..methods.recipes import Recipe
from ..support.files import StrPath
from .finish import factors_of, finish, starts_of

logger = logging.getLogger("quailora")


class RecalibrationCallback(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Fits the adapter again every so many steps, on the latest batches of the training; see `finish`.

    What training has changed is kept as well as it fits into the rank, and the rest of the rank makes up for the
    quantization as the trained model meets it. The fitted factors are turned so that they are close to those before,
    and the optimizer begins anew with its averages of the gradients.

    Args:
        peft_model: the `PeftModel` that is trained, before its training.
        every: steps between two fits.
        weights: the full-precision model, see `initialize`.
        initial: the adapter before its training, as for `finish`, where a training goes on from a checkpoint. What it
            is now if None, which is right where the training begins.
        batches: how many of the latest batches to calibrate on.
        recipe: name of a method, or a `Recipe`.
        adapter_name: name of the adapter.

    Raises:
        ConfigurationError: if there would be no step between two fits, or no batch, or directions are frozen.
    """

    def __init__(
        self,
        peft_model: Any,
        every: int,
        *,
        weights: Any = None,
        initial: StrPath | Mapping[str, Factors] | None = None,
        batches: int = 16,
        recipe: Recipe | str = "best",
        adapter_name: str = "default",
    ) -> None:
        if min(every, batches) < 1:
            raise ConfigurationError(f"Expected at least one step and one batch, got every={every}, batches={batches}.")
        layers = wrapped_layers(peft_model, adapter_name)
        check_none_frozen(layers.values(), "`RecalibrationCallback`")
        self._model, self._adapter = peft_model, adapter_name
        self._every, self._weights, self._recipe = every, weights, recipe
        self._starts: Mapping[str, Factors] = (
            factors_of(peft_model, adapter_name) if initial is None else starts_of(initial, layers)
        )
        self._batches: deque[dict[str, Tensor]] = deque(maxlen=batches)
        self._watching: Any = None

    @override
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin to keep the batches that the model is run on."""
        self._watching = self._model.get_base_model().register_forward_pre_hook(self._keep, with_kwargs=True)

    @override
    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Keep no batches any more."""
        self._watching.remove()
        self._batches.clear()

    @override
    def on_step_end(self, _: Any, state: Any, control: Any, optimizer: Any = None, **__: Any) -> None:
        """Fit the adapter, if it is time."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        before = factors_of(self._model, self._adapter)
        batches = list(self._batches)
        finish(
            self._model,
            batches,
            initial=self._starts,
            weights=self._weights,
            recipe=self._recipe,
            adapter_name=self._adapter,
            show_progress_bar=False,
        )
        fitted: dict[str, Factors] = {}
        for name, layer in wrapped_layers(self._model, self._adapter).items():
            layer.restore(turned(layer.kept(), before[name]))
            fitted[name] = layer.kept()
            for parameter in layer.parameters:
                optimizer.state.pop(parameter, None)
        self._starts = {name: continued(fitted[name], before[name], self._starts.get(name)) for name in fitted}
        logger.info("Fitted the adapter again after step %d.", state.global_step)

    def _keep(self, module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            names = ("input_ids", "attention_mask", "labels", "position_ids")
            self._batches.append({name: inputs[name].detach() for name in names if inputs.get(name) is not None})


def turned(fitted: Factors, before: Factors) -> Factors:
    """Return factors with the same product, turned so that they are as close as can be to those before.

    For a rotation `R`, `(B R^T) (R A) = B A`. The one that minimises `||R A - A0||_F^2 + ||B R^T - B0||_F^2` is the
    polar factor of `A0 A^T + B0^T B` (orthogonal Procrustes, Schönemann, 1966).
    """
    near = (before.lora_A @ fitted.lora_A.T + before.lora_B.T @ fitted.lora_B).double()
    left, _, right = torch.linalg.svd(near)
    rotation = (left @ right).to(fitted.lora_A)
    return Factors(fitted.lora_B @ rotation.T, rotation @ fitted.lora_A)


def continued(fitted: Factors, before: Factors, start: Factors | None) -> Factors:
    """Return a start from which the fitted factors differ by what training had changed before the fit.

    With `B1 A1` fitted, `B A` before the fit and `B0 A0` at first, training has changed `B A - B0 A0`. So the start is
    `B1 A1 - B A + B0 A0`, of a higher rank.
    """
    lora_B, lora_A = [fitted.lora_B, -before.lora_B], [fitted.lora_A, before.lora_A]
    if start is not None:
        lora_B.append(start.lora_B.to(fitted.lora_B))
        lora_A.append(start.lora_A.to(fitted.lora_A))
    return Factors(torch.cat(lora_B, 1), torch.cat(lora_A))
