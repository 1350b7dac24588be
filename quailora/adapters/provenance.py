"""The base that an adapter was made for, as its own files name it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.files import read_json
from ..quantizers import Quantizer
from ..quantizers.identity import BaseIdentity
from ..support.settings import build

_KEY = "quailora"


@final
@dataclass(frozen=True)
class Origin:
    """What an adapter was made from. It is written to a place in `adapter_config.json` that training keeps.

    This place is the field `auto_mapping`, which PEFT reads only for adapters without a task type, and keeps from
    loading to saving.

    Attributes:
        version: version of quailora that made the adapter.
        model: hub name or folder of the full-precision model.
        quantizer: description of the base's quantizer, see `describe`; empty if the base was there before the adapter.
        checkpoint: hub name or folder of the base, if it was there before the adapter.
        needs: what it takes besides the model and the quantizer to make the base: nothing but the "model"; also its
            "calibration"; or it cannot be made again, and has to be there as a "base".
        layers: how many layers have a correction.
        base: identity of all these layers of the base together.
        initial: hash of the factors before training; empty in files of earlier versions.
        frozen_rank: number of directions that are the correction and stay as they are; None if all are trained.
        holds: hash of the trained adapter whose change the factors hold besides the correction, as `rebase` writes
            them; empty for starts. The folder `change` beside them has this change alone.
        frozen: hash of the frozen directions, where the others added nothing before training; else empty.
    """

    version: str
    model: str
    quantizer: Mapping[str, Any]
    checkpoint: str | None
    needs: str
    layers: int
    base: BaseIdentity
    initial: str
    frozen_rank: int | None = None
    holds: str = ""
    frozen: str = ""

    def as_config(self) -> dict[str, Any]:
        """Return what `adapter_config.json` holds."""
        return {"auto_mapping": {_KEY: asdict(self)}}

    @property
    def built_quantizer(self) -> Quantizer:
        """The quantizer of the base.

        Raises:
            ModelError: if it is unknown here.
        """
        return build(Quantizer, self.quantizer)  # type: ignore[type-abstract]

    @property
    def stock_quantizer(self) -> Quantizer | None:
        """The quantizer that makes the base while stock transformers loads the model; None if nothing does.

        Raises:
            ModelError: if it is unknown here.
        """
        if self.needs != "model" or not self.quantizer:
            return None
        quantizer = self.built_quantizer
        return quantizer if quantizer.stock_config() is not None else None

    @classmethod
    def read(cls, content: Any, file: Path) -> Origin:
        """Build what `dataclasses.asdict` wrote down, after a trip through JSON.

        Raises:
            ModelError: if it is something else.
        """
        expected: dict[str, type | tuple[type, ...]] = {
            "version": str,
            "model": str,
            "quantizer": dict,
            "checkpoint": (str, type(None)),
            "needs": str,
            "layers": int,
            "base": dict,
            "initial": str,
        }
        found = content if isinstance(content, dict) else {}
        wrong = [name for name, kind in expected.items() if name not in found or not isinstance(found[name], kind)]
        if wrong:
            raise ModelError(
                f"{file} should say what the adapter was made from, but its entry {wrong[0]!r} is missing or of "
                "another type. The file is damaged, or was written by another version of quailora."
            )
        frozen = found.get("frozen_rank")  # which files of earlier versions do not say
        if not isinstance(frozen, (int, type(None))):
            raise ModelError(
                f"Expected a number of directions as frozen_rank in {file}, got {frozen!r}. It is damaged."
            )
        hashes = {name: found.get(name, "") for name in ("holds", "frozen")}
        for name, one in hashes.items():
            if not isinstance(one, str):
                raise ModelError(f"Expected the hash of tensors as {name} in {file}, got {one!r}. It is damaged.")
        read = {name: found[name] for name in expected} | hashes
        return cls(**read | {"base": BaseIdentity.read(found["base"]), "frozen_rank": frozen})


def earlier_provenance(content: Mapping[str, Any], sidecar: Path) -> Provenance:
    """Return what a sidecar says that was written before adapters noted their origin.

    Such a sidecar has one hash for each layer of the base, of everything that is stored for the layer, and the oldest
    ones have none. Whether the base can be made again follows from the method. Factors before training are not noted.

    Raises:
        ModelError: if the sidecar does not say what it should.
    """
    expected: dict[str, type] = {"base_model": str, "quantizer": dict, "calibration": dict, "versions": dict}
    expected |= {"schedule": dict, "inputs": str, "base": dict}
    content = {"schedule": {"class_path": "Once"}, "inputs": "full", "base": {}} | dict(content)
    wrong = [name for name, kind in expected.items() if not isinstance(content.get(name), kind)]
    if wrong or not all(isinstance(one, str) for one in content["base"].values()):
        raise ModelError(
            f"{sidecar} should say what the adapter was made from, but its entry {(wrong or ['base'])[0]!r} is missing "
            "or of another type. The file is damaged, or was written by another version of quailora."
        )
    layers = {name: BaseIdentity.of_hash(exact) for name, exact in content["base"].items()}
    described = content["quantizer"]
    existing = str(described.get("class_path", "")).endswith(".Prequantized")
    needs = "model"
    if existing or not str(content["schedule"].get("class_path", "")).endswith("Once"):
        needs = "base"
    elif not existing and build(Quantizer, described).needs_calibration:  # type: ignore[type-abstract]
        needs = "calibration" if content["inputs"] == "full" else "base"
    origin = Origin(
        version=str(content["versions"].get("quailora", "")),
        model=content["base_model"],
        quantizer={} if existing else described,
        checkpoint=str(described["init_args"]["base"]) if existing else None,
        needs=needs,
        layers=len(layers),
        base=BaseIdentity.together(layers) if layers else BaseIdentity.of_hash(""),
        initial="",
    )
    return Provenance(origin, layers, content["calibration"])


@final
@dataclass(frozen=True)
class Provenance:
    """What the folder of an adapter says about its base.

    Attributes:
        origin: None for an adapter that quailora did not make.
        layers: identity of each layer of the base that has a correction; empty after training into another folder,
            where nothing but the adapter's own configuration is left.
        calibration: description of what `init` was calibrated on; empty in the same case.
        uncorrected: identity of each other layer of the base, if the corrections make up for the errors of these
            layers as well; empty in the same case.
    """

    origin: Origin | None = None
    layers: Mapping[str, BaseIdentity] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    uncorrected: Mapping[str, BaseIdentity] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, BaseIdentity]:
        """Identity of all layers of the base that is known one by one."""
        return {**self.layers, **self.uncorrected}

    def different(self, found: Mapping[str, BaseIdentity], *, exactly: bool = False) -> list[str]:
        """Return the names of the layers whose base is another one, or one entry that stands for all of them.

        Args:
            found: identity of each layer of a base; layers that nothing was noted of are ignored.
            exactly: whether differences that come from threads and devices count as well.
        """
        # The sidecar knows each layer. What training keeps in the configuration is about all of them together, and can
        # only say that something differs.
        if self.layers:
            known = self.known.items()
            return [name for name, one in known if name not in found or not one.is_same(found[name], exactly=exactly)]
        if self.origin is None or self.origin.base.is_same(BaseIdentity.together(found), exactly=exactly):
            return []
        return ["all layers together"]

    def incomparable(self, found: Mapping[str, BaseIdentity]) -> bool:
        """Return whether nothing that is known of the layers of a base can be compared with what was noted.

        That happens with files of earlier versions, which noted a hash of the stored codes and scales, and a base that
        is there in dequantized form, or which noted nothing of the base.

        Args:
            found: identity of each layer of a base.
        """
        if not self.layers:
            return self.origin is not None and not self.origin.base.is_comparable(BaseIdentity.together(found))
        both = [one.is_comparable(found[name]) for name, one in self.known.items() if name in found]
        return bool(both) and not any(both)

    def distance(self, found: Mapping[str, BaseIdentity]) -> float:
        """Return an estimate of `|Q - Q'| / |W - Q|`, over all layers; infinite if only hashes are known."""
        if self.origin is None:
            return 0.0
        base = BaseIdentity.together(self.known) if self.uncorrected else self.origin.base
        chosen = {name: found[name] for name in self.known if name in found} if self.layers else found
        return base.distance(BaseIdentity.together(chosen))


def read_provenance(adapter: Path) -> Provenance:
    """Return what an adapter's configuration and its sidecar `quailora.json` say.

    Raises:
        ModelError: if there is no adapter in the folder, or a file is damaged, or the sidecar is of another adapter.
    """
    file, sidecar = adapter / "adapter_config.json", adapter / "quailora.json"
    if not file.is_file():
        raise ModelError(f"Expected an adapter folder with adapter_config.json, but {adapter} has none.")
    noted = read_json(file).get("auto_mapping")
    noted = noted.get(_KEY) if isinstance(noted, dict) else None
    origin = None if noted is None else Origin.read(noted, file)
    if not sidecar.is_file():
        return Provenance(origin)
    content = read_json(sidecar)
    if origin is None and "origin" not in content and content:
        return earlier_provenance(content, sidecar)
    beside = Origin.read(content.get("origin"), sidecar)
    if origin is not None and origin != beside:
        raise ModelError(
            f"{sidecar} belongs to another adapter than {file}: they name different origins. Remove the one that was "
            "copied here."
        )
    parts = {"uncorrected": {}, **content}  # which files of earlier versions do not have
    found: list[Any] = [parts.get(key) for key in ("base", "uncorrected", "calibration")]
    if not all(isinstance(part, dict) for part in found):
        raise ModelError(f"{sidecar} should list the layers of the base and the calibration. It is damaged.")
    layers, uncorrected = ({name: BaseIdentity.read(one) for name, one in part.items()} for part in found[:2])
    return Provenance(beside, layers, found[2], uncorrected)


def unknown_base(adapter: Path | str) -> str:
    """Return what to say about an adapter whose folder does not tell its base."""
    return (
        f"The folder {adapter} does not tell which base its adapter is for: neither adapter_config.json nor a "
        "quailora.json beside it says so, because quailora did not make it, or a tool did not keep the note."
    )


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of tensors with their names; they are compared in float32."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
