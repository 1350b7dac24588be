"""Train the layers of a block that a run has initialized, and keep what they have become beside what they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..bases.dequantized import FloatWeight
from ..bases.packed import unpacked
from ..calibration.examples import BlockExamples
from ..methods.block_training import BlockTraining, TrainedBlock
from ..models.layers import Layer
from ..models.weights import replaced
from ..quantizers import QuantizedWeight
from ..quantizers.identity import BaseIdentity
from ..support import distributed
from .keys import trained_key
from .store import Store, StoredLayer


def train_block(
    training: BlockTraining,
    examples: BlockExamples,
    layers: Mapping[str, Layer],
    store: Store,
    keys: Mapping[str, str],
) -> None:
    """Train a block, unless this was done before. Experts in fused parameters stay as they are.

    Args:
        training: settings.
        examples: inputs of the block, and outputs to aim at.
        layers: all layers of the model.
        store: holds the layers of the block, and is to hold the trained ones.
        keys: names of the layers of the block, and what they are called in the store.
    """
    # Experts are matrices inside one parameter, which their module reads as a whole. There is no forward pass of one of
    # them that could compute with something else.
    trained = {name: key for name, key in keys.items() if layers[name].expert is None}
    if all(distributed.gather(all(store.has(trained_key(key)) for key in trained.values()))):
        return
    before = {name: store.load(key) for name, key in keys.items()}
    weights = {name: weight_of(before[name], training) for name in trained}
    corrections = {name: before[name].correction for name in trained}
    others = {name: compensated(stored) for name, stored in before.items() if name not in trained}
    with replaced(layers, others):
        found = training.improve(
            examples,
            {name: layers[name] for name in trained},
            weights,
            {name: correction for name, correction in corrections.items() if correction is not None},
        )
    if distributed.rank() == 0:
        for name, key in trained.items():
            store.save(trained_key(key), trained_layer(before[name], weights[name], found, layers[name]))


def untrained(layers: Mapping[str, Layer], blocks: Sequence[str], store: Store, keys: Mapping[str, str]) -> bool:
    """Return whether a layer lacks what `train_block` has made of it, because its file is gone.

    Args:
        layers: the layers that a run has initialized.
        blocks: names of the blocks, all of which were trained.
        store: what the run has kept.
        keys: what layers are called in the store.
    """
    prefixes = tuple(f"{block}." for block in blocks)
    trained = [name for name, layer in layers.items() if name.startswith(prefixes) and layer.expert is None]
    return not all(store.has(trained_key(keys[name])) for name in trained)


def weight_of(stored: StoredLayer, training: BlockTraining) -> QuantizedWeight:
    """Return the quantized weight of a layer, with its codes and scales if these are trained and are known."""
    assert stored.dequantized is not None
    if training.changes_base and stored.packed:
        return unpacked(stored.packed, stored.dequantized.dtype)
    return FloatWeight(stored.dequantized)


def trained_layer(before: StoredLayer, weight: QuantizedWeight, found: TrainedBlock, layer: Layer) -> StoredLayer:
    """Return a layer after the training of its block, in which its weight may have stayed as it was.

    Errors in its record remain those before the training, which were measured on inputs that are gone by then.

    Args:
        before: the layer before the training.
        weight: its quantized weight before the training.
        found: the trained block.
        layer: the layer of the model.
    """
    correction, trained = found.corrections.get(layer.name), found.weights[layer.name]
    record = before.record and replace(
        before.record, block_error=found.before, block_error_trained=min(found.before, found.after)
    )
    if isinstance(weight, FloatWeight) or trained is weight:
        return StoredLayer(record, correction, before.dequantized, before.packed)
    values = trained.dequantize()
    record = record and replace(record, base=BaseIdentity.of(trained, layer.weight.to(values.device)))
    return StoredLayer(record, correction, values, trained.packed())


def compensated(stored: StoredLayer) -> Tensor:
    """Return what a layer computes with in the quantized network: `Q + C`, or `Q`."""
    if stored.dequantized is None:
        raise RuntimeError("no weight of the layer was kept")
    if stored.correction is None:
        return stored.dequantized
    change = stored.correction.change(stored.dequantized)
    return stored.dequantized + change.weight.to(stored.dequantized.dtype)
