"""Train a merged model: codes and scales block by block, and then all scales together."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from ..bases.packed import unpacked
from ..calibration.blocks import find_chain
from ..calibration.tokens import CalibrationTokens
from ..errors import DoesNotFitError, ModelError
from ..methods.block_training import TRAINED_BYTES, BlockTraining
from ..models.layers import largest_block
from ..models.limits import check_token_ids
from ..models.weights import is_offloaded
from ..pipeline.fingerprint import digest
from ..pipeline.output import AdapterOutput
from ..pipeline.plan import RunPlan
from ..pipeline.store import Store, StoredLayer
from ..quantizers import QuantizedWeight
from ..support.machine import size
from .scales import ScaleTraining

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class MergeTraining:
    """What is trained after the codes of a merged model have been chosen, layer by layer, in closed form.

    Attributes:
        blocks: of codes and scales, block by block.
        scales: of all scales together, which follows; the model has to be in memory for it.
    """

    blocks: BlockTraining = BlockTraining()  # noqa: RUF009 # frozen
    scales: ScaleTraining = ScaleTraining()  # noqa: RUF009 # frozen

    @classmethod
    def none(cls) -> MergeTraining:
        """Return the settings that train nothing."""
        return cls(BlockTraining(steps=0), ScaleTraining(steps=0))


def trained_layers(finished: AdapterOutput, training: MergeTraining) -> tuple[dict[str, StoredLayer], str]:
    """Return the layers of a finished run as training has left them, and what was done to them in a few sentences.

    What an earlier, killed run has trained is taken if it is there. Scales are not trained together, with a warning,
    where weights wait on disk; and neither training takes place where the format has nothing to train.
    """
    # Results are kept in the store of the run like layers, so that a killed process does not train again.
    layers, store = finished.finished, finished.run.store
    packed = {name: one for name, one in layers.items() if one.packed}
    # All layers have one format, so that one of them says what there is to train.
    if not any(one.code_count or one.scale_count for one in weights_of(dict([*packed.items()][:1])).values()):
        return layers, "Its codes and scales were not trained."
    blocks = _Kept(store, f"blocks-{digest([repr(training.blocks)])}", packed)
    scales = _Kept(store, f"scales-{digest([repr(training)])}", packed)
    found, said = packed, "Its codes were not trained."
    if training.blocks.steps:
        found, said = _by_block(finished, training.blocks, found, blocks)
    if not training.scales.steps:
        return layers | found, f"{said} Its scales were not trained together."
    found, also = _together(finished, training.scales, found, scales)
    return layers | found, f"{said} {also}"


def check_memory(plan: RunPlan, training: MergeTraining) -> None:
    """Warn before a run if training its blocks takes more memory than there is.

    Args:
        plan: the run.
        training: what is trained after it.

    Raises:
        DoesNotFitError: if a limit was given, and the training would stay above it.
    """
    if not training.blocks.steps:
        return
    largest = largest_block({name: math.prod(layer.shape) for name, layer in plan.adapter.layers.items()})
    needed = TRAINED_BYTES * largest + (0 if plan.on_disk else plan.estimate.model_bytes)
    if needed <= plan.estimate.available:
        return
    other = "" if plan.on_disk else ", or leave the weights on disk with `offload='always'`"
    message = (
        f"Training a block takes about {size(needed)} of {plan.estimate.memory}, and {size(plan.estimate.available)} "
        f"may be used. Train no blocks{other}."
    )
    if plan.resources.memory_limit is not None:
        raise DoesNotFitError(message)
    logger.warning(message)


def _by_block(
    finished: AdapterOutput, training: BlockTraining, layers: Mapping[str, StoredLayer], kept: _Kept
) -> tuple[dict[str, StoredLayer], str]:
    source, model = finished.plan.source, finished.loaded.model
    if not all(map(kept.has, layers)):
        windows, held_out = (check_token_ids(model, ids) for ids in training.drawn(source, finished.loaded.tokenizer))
        try:
            chain = find_chain(model, CalibrationTokens.of_windows(windows).probe())
        except ModelError as error:
            logger.warning("Codes are not trained. %s", error)
            return dict(layers), f"Its codes were not trained: {error}"
        trained = training.train(
            chain, finished.run.layers, weights_of(layers), windows, held_out, source.dtype, kept.weights(), kept.save,
            finished.run.store.folder_for("hidden") if is_offloaded(model) else None,
        )  # fmt: skip
        kept.save({name: weight for name, weight in trained.items() if not kept.has(name)})
    found = kept.layers()
    changed = sum(not _equal(layers[name], found[name]) for name in found)
    said = f"Its codes and scales were trained block by block, for {training.steps} steps each"
    unhelpful = "" if changed else ", which was no better on held-out text, so that they are as they were"
    return found, f"{said}{unhelpful}."


def _together(
    finished: AdapterOutput, training: ScaleTraining, layers: Mapping[str, StoredLayer], kept: _Kept
) -> tuple[dict[str, StoredLayer], str]:
    source, model = finished.plan.source, finished.loaded.model
    if is_offloaded(model):
        logger.warning("Scales are not trained together, because the weights of the model are on disk.")
        return dict(layers), "Its scales were not trained together, because the weights of the model were on disk."
    if not all(map(kept.has, layers)):
        windows, held_out = (check_token_ids(model, ids) for ids in training.windows(source, finished.loaded.tokenizer))
        kept.save(training.train(model, finished.run.layers, weights_of(layers), windows, held_out, source.dtype))
    found = kept.layers()
    same = all(_equal(layers[name], found[name]) for name in found)
    unhelpful = ", which was no better on held-out text, so that they are as they were" if same else ""
    return found, f"Its scales were trained together for {training.steps} steps{unhelpful}."


def weights_of(layers: Mapping[str, StoredLayer]) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of layers that are kept as a checkpoint has them."""
    return {
        name: unpacked(one.packed, one.dequantized.dtype) for name, one in layers.items() if one.dequantized is not None
    }


def _equal(one: StoredLayer, other: StoredLayer) -> bool:
    return all(torch.equal(other.packed[key], part) for key, part in one.packed.items())


@dataclass(frozen=True, eq=False)
class _Kept:
    """Trained layers in the store of a run.

    Attributes:
        store: the store.
        prefix: of their keys, with a hash of the settings of the training.
        before: the layers before the training.
    """

    store: Store
    prefix: str
    before: Mapping[str, StoredLayer]

    def has(self, name: str) -> bool:
        """Return whether a layer is there."""
        return self.store.has(f"{self.prefix}/{name}")

    def save(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Keep layers."""
        for name, weight in weights.items():
            self.store.save(f"{self.prefix}/{name}", StoredLayer(None, None, weight.dequantize(), weight.packed()))

    def weights(self) -> dict[str, QuantizedWeight]:
        """Return the quantized weights of the layers that are there."""
        return weights_of({name: self.load(name) for name in self.before if self.has(name)})

    def layers(self) -> dict[str, StoredLayer]:
        """Return all layers."""
        return {name: self.load(name) for name in self.before}

    def load(self, name: str) -> StoredLayer:
        """Return a layer."""
        return self.store.load(f"{self.prefix}/{name}")
