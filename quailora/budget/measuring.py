"""Measure what each choice would cost in each layer of a model: one walk, and some backward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.collector import LayerInputs
from ..calibration.tokens import CalibrationTokens
from ..calibration.walk import Block, Walk
from ..errors import ConfigurationError, named
from ..layer.asymmetric import chosen_step, validation_of
from ..methods.method import Method
from ..models.layers import Layer, all_layers, linear_layers, stock_quantizes
from ..models.limits import check_token_ids
from ..models.load import LoadedModel
from ..pipeline.checkpoint import locked, open_checkpoint
from ..pipeline.estimate import parameter_bytes
from ..pipeline.fingerprint import fingerprint
from ..pipeline.loading import loaded_model
from ..pipeline.plan import RunPlan, title_of
from ..pipeline.store import Store, StoredLayer
from ..support import distributed
from ..support.progress import counting
from .choices import Choice, PlannedLayer, column_bytes
from .costs import divergence_of_reference, held_out_pieces, measure_costs, weight_in
from .layer_errors import best_rounding, quantizers_of, rounding_errors
from .measurements import MeasuredLayer, Measurements
from .question import Question


def measure_model(plan: RunPlan, question: Question, folder: Path, *, fresh: bool = False) -> Measurements:
    """Measure the layers of a model; what was measured before a process was killed is not measured again.

    Args:
        plan: the model and the text; see `measure_choices`.
        question: what is to be measured.
        folder: an existing folder for the state of the measurement.
        fresh: forget what is there.

    Raises:
        ConfigurationError: if there are several processes.
        ResumeError: if the folder holds the state of another measurement.
    """
    if distributed.world_size() > 1:
        raise ConfigurationError("Layers are measured by one process. Start it without torchrun.")
    began = time.perf_counter()
    with ExitStack() as held:
        held.enter_context(locked(folder))
        loaded = loaded_model(plan, None)
        layers = plan.adapter.of(all_layers(loaded.model))
        held.callback(loaded.model.train, loaded.model.training)
        loaded.model.eval()
        tokens = plan.source.tokens(loaded.tokenizer)
        check_token_ids(loaded.model, torch.cat(tokens.sequences)[None])
        settings = question.described() | {"layers": list(layers), "calibration_dtype": plan.source.dtype}
        depends = fingerprint(settings, loaded, tokens)
        store = open_checkpoint(folder, depends, fresh)
        pieces = held_out_pieces(tokens)
        measure_errors(plan, question, loaded, layers, tokens, store)
        costs = measure_costs(question, loaded, layers, pieces, store, plan.source.dtype)
        others = layers_besides(plan, question, loaded.model)
        measured = {}
        for (name, layer), row in zip(layers.items(), costs.tolist(), strict=True):
            nbytes = tuple(choice.nbytes(layer) if choice.is_packed(layer) else 0 for choice in question.choices)
            measured[name] = MeasuredLayer(layer.shape, nbytes, tuple(row))
        return Measurements(
            title_of(plan.model),
            depends,
            question.choices,
            question.reference,
            question.recipe,
            divergence_of_reference(loaded, layers, pieces, store),
            other_bytes(loaded.model, layers, others, question.choices),
            measured,
            time.perf_counter() - began,
            others,
        )


def layers_besides(plan: RunPlan, question: Question, model: Any) -> dict[str, PlannedLayer]:
    """Return what becomes of the linear layers that are not measured, because they cannot have an adapter.

    A base that is written keeps them in full precision. One that bitsandbytes makes while it loads the model has them
    in 4 bits.

    Args:
        plan: the model and the layers that are measured.
        question: the choices.
        model: the model, with or without weights.
    """
    choice = Choice(None) if is_written(plan.method, question.choices) else Choice(question.reference.quantizer)
    others = {name: layer for name, layer in linear_layers(model).items() if name not in plan.adapter.layers}
    chosen = {name: choice if stock_quantizes(layer) else Choice(None) for name, layer in others.items()}
    return {
        name: PlannedLayer(chosen[name], math.prod(layer.shape), chosen[name].nbytes(layer))
        for name, layer in others.items()
    }


def is_written(method: Method, choices: Sequence[Choice]) -> bool:
    """Return whether the base of a plan has to be written, because stock packages do not make it."""
    quantizer = method.quantizer
    stock = quantizer is not None and quantizer.stock_config() is not None
    return method.changes_base or not stock or Choice(None) in choices


def other_bytes(
    model: Any, layers: Mapping[str, Layer], others: Mapping[str, PlannedLayer], choices: Sequence[Choice]
) -> int:
    """Return the bytes of a model beside the layers that are measured; see `Measurements`.

    Args:
        model: the model, with or without weights.
        layers: the layers that are measured.
        others: what becomes of the other linear layers.
        choices: the choices, which say what format the base has.
    """
    linear = {f"{name}.weight" for name in (*layers, *others)}
    kept = sum(nbytes for name, nbytes in parameter_bytes(model).items() if name not in linear)
    return kept + sum(one.nbytes for one in others.values()) + column_bytes(choices, layers)


def measure_errors(
    plan: RunPlan,
    question: Question,
    loaded: LoadedModel,
    layers: Mapping[str, Layer],
    tokens: CalibrationTokens,
    store: Store,
) -> None:
    """Walk through the model, and keep what each quantizer leaves of each layer, with its reference weight.

    Layers that are kept already are not measured again.
    """
    done = sum(map(store.has, layers))
    with counting("Measuring errors", len(layers), done) as counter:

        def visit(block: Block) -> Mapping[str, Tensor]:
            counter.describe(f"Block {block.index}: errors")
            for inputs in block.drain():
                if not store.has(inputs.layer.name):
                    with named(inputs.layer.name):
                        store.save(inputs.layer.name, stored_errors(inputs, plan.method, question))
                    counter.advance()
            # Later layers are fitted to the inputs that they have in the reference network.
            return {name: weight_in(store.load(name)) for name in block.layers}

        # Paired inputs of both networks are more than is needed: this is the walk that holds tokens out.
        walk = Walk(
            loaded.model,
            plan.adapter.reach.watched(layers),
            tokens,
            inputs="asymmetric",
            dtype=plan.source.dtype,
            activations=store.activations,
            start=store.blocks_done,
            on_done=store.set_blocks_done,
        )
        walk.run(visit)
        # A second walk from block 0 makes layers of finished blocks again whose files are gone.
        if not all(map(store.has, layers)):
            replace(walk, start=0).run(visit)


def stored_errors(inputs: LayerInputs, method: Method, question: Question) -> StoredLayer:
    """Return what each quantizer leaves of a layer, and the weight of the layer in the reference network.

    Args:
        inputs: the layer, and what is known of its inputs in both networks.
        method: says how far the target of a layer moves from its weight.
        question: the choices.
    """
    paired, reference = inputs.paired, question.reference
    assert paired is not None  # experts are no targets
    # The target makes up for the errors of earlier layers, as it does when a plan is carried out. Bases and adapters
    # are fitted to some tokens and measured on others. On their own tokens high ranks would look better than they are,
    # since they follow the noise of these as well.
    assert reference.quantizer is not None  # the reference network is quantized
    pair = paired.all_tokens, paired.held_out
    fit, ridge, share = chosen_step(inputs.layer.weight, *pair, method.step)
    validation = validation_of(reference.quantizer, *pair, fit, ridge, share)
    layer = validation.layer
    assert layer.statistics is not None
    # One way of rounding for all quantizers of the layer, the best one of the reference's. A base that is not chosen is
    # what the quantizer makes of the weight itself, and only adapters come close to the target.
    chosen = method.initializer.schedule.changes_base
    rounding = best_rounding(reference.quantizer, validation) if chosen else 0
    target = layer.weight.to(layer.dtype) if chosen else layer.weight
    rounded = target if chosen else inputs.layer.weight
    kept: dict[str, Tensor] = {}
    found = target
    errors = rounding_errors(target, layer.statistics, question.choices, rounding, rounded)
    for number, (quantizer, error) in enumerate(zip(quantizers_of(question.choices), errors, strict=True)):
        kept |= error.tensors(number)
        if quantizer == reference.quantizer:
            # A small layer may not carry the rank of the reference. It then has the largest one that it can carry.
            found = (target.float() - error.left(min(reference.rank, *target.shape))).to(layer.dtype)
    return StoredLayer(dequantized=found, packed=kept)
