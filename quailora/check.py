"""Whether an adapter belongs on a base, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from .adapters.provenance import read_provenance
from .bases import StoredBase
from .errors import ModelError, named
from .models.layers import all_layers
from .models.load import DeviceName, DtypeName, load_model
from .progress import track
from .quantizers import Quantizer
from .report.settings import build
from .report.tables import print_table


@final
@dataclass(frozen=True)
class BaseCheck:
    """What `check` returns: all layers agree.

    Attributes:
        adapter: folder of the adapter.
        base: the base as it was asked for.
        layers: how many layers were compared.
    """

    adapter: str
    base: str
    layers: int

    def show(self) -> None:
        """Print a line."""
        print_table(f"{self.adapter} belongs on {self.base}", ("layers", "differ"), [[str(self.layers), "0"]])


def check(
    adapter: str,
    *,
    base: str,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
) -> BaseCheck:
    """Say whether an adapter belongs on a base, by the codes and scales of every layer.

    Args:
        adapter: folder that `init` wrote; training adds files to such a folder, and changes none of the base.
        base: a quantized checkpoint; or the full-precision model, if the base is quantized while it loads.
        dtype: in which the full-precision model is loaded; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a full-precision model brings along, for models that transformers
            does not know.

    Raises:
        ModelError: if it does not belong there; the message says in how many layers, and in which first.
    """
    provenance = read_provenance(Path(adapter).expanduser())
    expected: Mapping[str, str] = provenance.get("base", {})
    if not expected:
        raise ModelError(f"{adapter} does not say which base it is for: it was not written by quailora's init.")
    stored = StoredBase(base)
    if stored.described:
        found = dict(hashes(stored, expected))
    else:
        found = dict(fresh_hashes(base, provenance, dtype, device, trust_remote_code))
    different = [name for name, digest in expected.items() if found.get(name) != digest]
    if different:
        raise ModelError(
            f"{adapter} does not belong on {base}: {len(different)} of {len(expected)} layers have other codes or "
            f"scales than those that it makes up for, {different[0]} first. Load it on the base that it was made for, "
            f"or make one for this base: quailora init MODEL --base {base}."
        )
    return BaseCheck(adapter, base, len(expected))


def hashes(stored: StoredBase, layers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the hash of each layer that a checkpoint has."""
    for name in track(layers, "Comparing", total=len(layers)):
        if name in stored.layers:
            yield name, stored.weight(name, torch.float32).digest


def fresh_hashes(
    model: str, provenance: Mapping[str, Any], dtype: DtypeName, device: DeviceName, trust_remote_code: bool
) -> Iterator[tuple[str, str]]:
    """Yield the hash of each layer of a full-precision model after it is quantized as the adapter's base was.

    Raises:
        ModelError: if its base cannot be made while it loads.
    """
    quantizer = build(Quantizer, provenance["quantizer"])  # type: ignore[type-abstract]
    if quantizer.stock_config() is None:
        raise ModelError(f"{model} is not quantized, and the base of this adapter is not made while a model loads.")
    layers = all_layers(load_model(model, dtype, device, trust_remote_code=trust_remote_code).model)
    for name in track(provenance["base"], "Comparing", total=len(provenance["base"])):
        if name in layers:
            with named(name):
                digest = quantizer.quantize(layers[name].weight).digest
            yield name, digest
