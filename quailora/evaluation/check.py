"""Whether an adapter belongs on a base, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch

from ..adapters.hub import adapter_folder
from ..adapters.provenance import Provenance, read_provenance, unknown_base
from ..adapters.saved import SavedAdapter
from ..bases import StoredBase
from ..errors import ModelError, named
from ..models.layers import all_layers
from ..models.load import DeviceName, DtypeName, load_model
from ..quantizers import Quantizer
from ..quantizers.identity import BaseIdentity
from ..support.files import StrPath
from ..support.machine import within_memory
from ..support.progress import track
from ..support.tables import print_table
from .base import described, share, untold


@final
@dataclass(frozen=True)
class BaseCheck:
    """What `check` returns: all layers agree.

    Attributes:
        adapter: hub name, or folder of the adapter.
        base: the base as the caller named it.
        layers: how many layers were compared.
    """

    adapter: str
    base: str
    layers: int

    def show(self) -> None:
        """Print a line."""
        print_table(f"{self.adapter} belongs on {self.base}", ("layers", "differ"), [[str(self.layers), "0"]])


@within_memory("`device='cpu'`")
def check(
    adapter: StrPath,
    *,
    base: StrPath,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
) -> BaseCheck:
    """Say whether an adapter belongs on a base, by the codes and scales of every layer.

    Args:
        adapter: folder that `init` wrote, or that training wrote from there.
        base: a quantized checkpoint, or one that `--save-base` has written in dequantized form; or the full-precision
            model, if the base is quantized while it loads.
        dtype: dtype that the full-precision model is loaded in; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a full-precision model brings along, for models that transformers
            does not know.

    Raises:
        ModelError: if it does not belong there; the message says in how many layers, and in which first.
    """
    folder, base = adapter_folder(adapter), str(base)
    provenance, saved = read_provenance(folder), SavedAdapter.read(folder)
    origin = provenance.origin
    if origin is None:
        raise ModelError(f"{unknown_base(folder)} Check the folder that init wrote.")
    # A base that is quantized is read layer by layer. Any other is the full-precision model, whose layers are quantized
    # here as they would be while it loads, or a base in dequantized form.
    stored = StoredBase(base)
    if stored.described:
        present = dict(identities(stored, saved, provenance))
    else:
        model = load_model(base, dtype, device, trust_remote_code=trust_remote_code).model
        present = dict(fresh_identities(model, origin.stock_quantizer, saved, provenance))
    if provenance.incomparable(present):
        raise ModelError(untold(folder, base))
    # Stored codes and scales that were not made while a model loads have no reason to differ in any bit.
    different = provenance.different(present, exactly=bool(stored.described) and origin.needs != "model")
    if different and not stored.described and origin.stock_quantizer is None:
        raise ModelError(f"{base} is not quantized, and the base of {folder} is not made while a model loads.")
    # Codes of a base that is quantized while it loads depend on the dtype of the weights that they are made from.
    remedy = f"make an adapter for this base: call init with `base='{base}'`"
    if not stored.described:
        remedy = f"pass the dtype that its model was loaded in with `dtype`, or make an adapter for {base} by init"
    if different:
        raise ModelError(
            f"{folder} does not belong on {base}: {described(provenance, different)}; "
            f"{share(provenance.distance(present))}. Load it on the base that it was made for, or {remedy}."
        )
    return BaseCheck(str(adapter), base, origin.layers + len(provenance.uncorrected))


def identities(stored: StoredBase, saved: SavedAdapter, provenance: Provenance) -> Iterator[tuple[str, BaseIdentity]]:
    """Yield the identity of each layer of a checkpoint that an adapter depends on."""
    names = sorted(name for name in stored.layers if saved.depends_on(name, provenance))
    for name in track(names, "Comparing", total=len(names)):
        yield name, BaseIdentity.of(stored.weight(name, torch.float32))


def fresh_identities(
    model: Any, quantizer: Quantizer | None, saved: SavedAdapter, provenance: Provenance
) -> Iterator[tuple[str, BaseIdentity]]:
    """Yield the identity of each layer that an adapter depends on, in a model that is not quantized.

    Layers are quantized first. Without a quantizer, where the base is not made while a model loads, the model should be
    that base in dequantized form.
    """
    layers = {name: one for name, one in all_layers(model).items() if saved.depends_on(name, provenance)}
    for name, layer in track(layers.items(), "Comparing", total=len(layers)):
        with named(name):
            if quantizer is None:
                identity = BaseIdentity.of_dequantized(layer.weight)
            else:
                identity = BaseIdentity.of(quantizer.quantize(layer.weight))
        yield name, identity
