"""One method over a whole model: what `init` does between loading and writing."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from ..calibration.empty_pass import Reach
from ..calibration.gradients import find_sensitivities
from ..calibration.walk import InputsOf, Walk
from ..calibration.windows import Calibration
from ..methods.method import Method
from ..models.layers import Layer
from ..models.load import LoadedModel
from ..solvers.fisher import Sensitivity
from ..support import distributed
from .checkpoint import Checkpoint
from .plan import quantized_layers
from .run import Run


def finished_run(
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "samples sequence_length"],
    method: Method,
    source: Calibration,
    checkpoint: Checkpoint,
    *,
    inputs: InputsOf,
    save_base: bool,
    seed: int,
    reach: Reach,
) -> Run:
    """Initialize all layers by a method, from where the checkpoint stands, and train them if the method says so.

    Args:
        loaded: the model.
        layers: the layers that get a correction.
        windows: calibration tokens.
        method: how.
        source: where the tokens are from.
        checkpoint: keeps what is finished.
        inputs: see `Walk`.
        save_base: whether the base will be written, so that all of it is quantized and kept.
        seed: of untrained directions.
        reach: what text does to the layers.
    """
    every = save_base or inputs != "full"
    of_base = quantized_layers(loaded.model, layers, method.initializer.quantizer) if every else layers
    walk = Walk(
        loaded.model,
        reach.watched(of_base),
        windows,
        inputs=inputs,
        dtype=source.dtype,
        activations=checkpoint.activations,
        start=distributed.from_first(checkpoint.blocks_done),
        on_done=checkpoint.set_blocks_done,
    )
    run = Run(
        walk,
        layers,
        {"": method},
        checkpoint,
        keep_weights=[""] if save_base or method.polish else [],
        keep_packed=save_base,
        seed=seed,
        sensitivities=sensitivities_for(method, loaded, layers, windows, source),
        silent=reach.idle(of_base) if save_base else {},
    )
    run.finish()
    run.polish("", method.polish, source, loaded.tokenizer)
    return run


def sensitivities_for(
    method: Method,
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    windows: Int[Tensor, "samples sequence_length"],
    source: Calibration,
) -> dict[str, Sensitivity]:
    """Return the sensitivities of layers, if a method needs them."""
    if method.initializer.metric != "fisher":
        return {}
    return find_sensitivities(loaded.model, layers, windows, source.dtype)
