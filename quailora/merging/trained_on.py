"""The quantized base that an adapter was trained on, found by what the adapter notes, and compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.change import TrainedChange
from ..adapters.provenance import read_provenance
from ..bases import ExistingBase, StoredBase
from ..bases.dequantized import DequantizedBase
from ..bases.fresh import FreshBase
from ..errors import ConfigurationError
from ..evaluation.base import ChosenBase, check_measured_on
from ..models.files import config_of
from ..models.layers import all_layers
from ..models.load import empty_model
from ..models.locate import resolve
from ..models.quantized import quantization_of
from ..models.single import LayerFiles
from ..quantizers import Quantizer
from ..quantizers.identity import BaseIdentity
from ..support.files import StrPath
from ..support.progress import track


def model_of(change: TrainedChange, model: StrPath | None) -> str:
    """Return the full-precision model of an adapter: the one that is named, else the one that its origin names.

    Raises:
        ConfigurationError: if nothing names one in full precision.
    """
    if model is not None:
        return str(model)
    saved = (change.before or change.trained).folder
    for folder in (saved, change.trained.folder):
        origin = read_provenance(folder).origin
        if origin is not None:
            return origin.model
    named = change.trained.config.get("base_model_name_or_path")
    if not named or quantization_of(resolve(str(named))):
        raise ConfigurationError(
            f"{change.trained.folder} does not say which full-precision model it belongs to, since its base is "
            f"{named!r}. Pass that model as `model`."
        )
    return str(named)


def check_model(change: TrainedChange, model: StrPath | None, compared: ExistingBase | None) -> None:
    """Raise a `ModelError` if the model that the caller names is another one than that of the adapter.

    It is quantized and compared with the base that the adapter notes, if that is made of the model while it loads: a
    model of the same shape with other weights would take the change without a word.

    Args:
        change: the adapter, with its start.
        model: the model as the caller names it. If None, the one that the adapter notes is compared where that is a
            folder, whose path may mean another model in another place.
        compared: the base that has been compared already, which may be the same one.
    """
    noted = read_provenance((change.before or change.trained).folder).origin
    quantizer = None if noted is None else noted.stock_quantizer
    if noted is None or quantizer is None:
        return
    experts = (change.before or change.trained).config.get("target_parameters")  # which no stock base quantizes
    if model is None and (experts or not Path(noted.model).expanduser().is_dir()):
        return
    name = noted.model if model is None else str(model)
    base = FreshBase(name, quantizer)
    if base != compared:
        check_base(change, name, base)


def base_at(place: StrPath) -> ExistingBase:
    """Return a checkpoint as a base, quantized or in dequantized form.

    Raises:
        ModelError: if there is no model.
    """
    stored = StoredBase(str(place))
    return stored if stored.described else DequantizedBase(str(place))


def base_trained_on(change: TrainedChange, model: str, given: Quantizer | StrPath | None) -> ExistingBase:
    """Return the quantized base that an adapter was trained on.

    Args:
        change: the adapter, with its start.
        model: the full-precision model.
        given: the base as the caller names it, in place of what the adapter notes.

    Raises:
        ConfigurationError: if nothing names it.
        ModelError: if it is another one than the adapter notes.
    """
    base = named_base(change, model, given)
    check_base(change, model, base)
    return base


def named_base(change: TrainedChange, model: str, given: Quantizer | StrPath | None) -> ExistingBase:
    """Return the base that the caller or the adapter names; see `base_trained_on`."""
    if isinstance(given, Quantizer):
        return FreshBase(model, given)
    if given is not None:
        return base_at(given)
    # What is nearest to the adapter counts most: a base beside it, then what its own note says, then PEFT's.
    folders = [change.trained.folder] + ([] if change.before is None else [change.before.folder])
    for folder in folders:
        if (folder / "base" / "config.json").is_file():
            return base_at(folder / "base")
    origin = next(filter(None, (read_provenance(folder).origin for folder in folders)), None)
    if origin is not None and origin.checkpoint is not None:
        return base_at(origin.checkpoint)
    if origin is not None and origin.stock_quantizer is not None:
        return FreshBase(model, origin.stock_quantizer)
    place = change.trained.config.get("base_model_name_or_path")
    if origin is None and place and place != model and config_of(resolve(str(place))):
        return base_at(str(place))
    raise ConfigurationError(
        f"{change.trained.folder} does not say which quantized base it was trained on. Pass it as `trained_on`: a "
        "checkpoint, or the quantizer of a base that was quantized while it was loaded, such as nf4."
    )


def check_base(change: TrainedChange, model: str, base: ExistingBase) -> None:
    """Raise a `ModelError` if a base is another one than the adapter notes."""
    saved = change.before or change.trained
    provenance = read_provenance(saved.folder)
    if provenance.origin is None:
        return
    layers = change.layers(all_layers(empty_model(model))).keys() | provenance.uncorrected.keys()
    found = identities(base, sorted(base.layers & layers), model)
    check_measured_on(change.trained.folder, provenance, found, ChosenBase(base), any_base=False)


def identities(base: ExistingBase, names: Sequence[str], model: str) -> Mapping[str, BaseIdentity]:
    """Return the identity of some layers of a base."""
    files: Any = LayerFiles(resolve(model), empty_model(model)) if isinstance(base, FreshBase) else None
    found = {}
    for name in track(names, "Comparing the base", total=len(names)):
        dtype = files.dtype(name) if files is not None else torch.float32
        weight = base.weight(name, dtype)
        dequantized = isinstance(base, DequantizedBase)
        found[name] = BaseIdentity.of_dequantized(weight.dequantize()) if dequantized else BaseIdentity.of(weight)
    return found
