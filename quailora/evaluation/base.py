"""Which quantized base an adapter is measured on, and whether it is the one that the adapter was made for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from ..adapters.provenance import Provenance, unknown_base
from ..bases import ExistingBase, StoredBase
from ..calibration.text import TextSource
from ..calibration.windows import Calibration
from ..errors import CalibrationError, ConfigurationError, ModelError
from ..quantizers import NF4, Quantizer
from ..quantizers.identity import BaseIdentity

logger = logging.getLogger("quailora")

_NEARLY = 0.3  # of the quantization error: less than another block size or type of codes, more than another dtype


@final
@dataclass(frozen=True)
class ChosenBase:
    """The quantized base that a model is measured on.

    Attributes:
        base: makes it from the full-precision model, or has its quantized weights; None if it is there in dequantized
            form.
        folder: folder of the dequantized base.
        calibration: calibration text and windows, for a quantizer that needs statistics.
    """

    base: Quantizer | ExistingBase | None
    folder: str | None = None
    calibration: Calibration | None = None

    @property
    def title(self) -> str:
        """The name of the base in messages."""
        if self.base is None:
            return str(self.folder)
        return self.base.title if isinstance(self.base, ExistingBase) else repr(self.base)

    def check_text(self) -> None:
        """Raise a `CalibrationError` if the text that the quantizer needs cannot be read."""
        if self.calibration is not None:
            self.calibration.text.check()

    @classmethod
    def at(cls, folder: str) -> ChosenBase:
        """Return a checkpoint as a base: quantized, or dequantized."""
        stored = StoredBase(folder)
        return cls(stored) if stored.described else cls(None, folder)

    @classmethod
    def by(cls, quantizer: Quantizer, calibration: Calibration) -> ChosenBase:
        """Return the base that a quantizer makes."""
        return cls(quantizer, calibration=calibration if quantizer.needs_calibration else None)


def choose_base(
    adapter: Path | None,
    provenance: Provenance,
    *,
    quantizer: Quantizer | None = None,
    base: str | None = None,
    calibration: str | None = None,
) -> ChosenBase:
    """Return the base to measure on: the one asked for, else the one that the adapter was made for, else NF4.

    Args:
        adapter: folder of the adapter.
        provenance: what the adapter's folder says about its base.
        quantizer: the quantizer that the caller asks for.
        base: the checkpoint that the caller asks for.
        calibration: text for a quantizer that needs statistics.

    Raises:
        ConfigurationError: if both a quantizer and a checkpoint are asked for.
        ModelError: if the folder does not tell the base, or the base cannot be made again.
        CalibrationError: if the base was calibrated on a text that was not named here.
    """
    if quantizer is not None and base is not None:
        raise ConfigurationError(
            "Expected `quantizer` or `base`, got both. A base that is there already has a quantizer."
        )
    origin = provenance.origin
    if base is not None:
        return ChosenBase.at(base)
    if adapter is None or (quantizer is not None and origin is None):
        return ChosenBase.by(quantizer or NF4(), Calibration(TextSource(calibration)))
    if origin is None:
        raise ModelError(
            f"{unknown_base(adapter)} Name the base: pass `quantizer` (nf4, fp4 or int8) for one that is quantized "
            "while it loads, or `base` with the checkpoint of one that is there."
        )
    own = adapter / "base"
    if quantizer is None and own.is_dir():
        return ChosenBase.at(str(own))
    if quantizer is None and origin.checkpoint is not None:
        return ChosenBase.at(origin.checkpoint)
    if quantizer is None and origin.needs == "base":
        raise ModelError(
            f"The base of {adapter} cannot be made again: it depends on corrections of its own layers, or another "
            "package has quantized it in memory. Pass it as `base`: init writes it with `save_base=True`, and other "
            "packages save it by `save_pretrained`."
        )
    wanted = quantizer or origin.built_quantizer
    return ChosenBase.by(
        wanted, recorded_calibration(adapter, provenance, calibration) if wanted.needs_calibration else Calibration()
    )


def recorded_calibration(adapter: Path, provenance: Provenance, text: str | None) -> Calibration:
    """Return what the base was calibrated on. A file that a sidecar names is read only if the caller names it, too.

    Args:
        adapter: folder of the adapter.
        provenance: what the adapter's folder says about its base.
        text: the text that the caller names, if any.

    Raises:
        ModelError: if the sidecar is not there, or damaged.
        CalibrationError: if the text has to be named.
    """
    if not provenance.calibration:
        raise ModelError(
            f"The base of {adapter} was quantized with calibration, which only the folder that init wrote describes. "
            "Pass that base as `base`; init writes it with `save_base=True`."
        )
    if "batches" in provenance.calibration:
        raise ModelError(
            f"The base of {adapter} was calibrated on batches of tokens that are not kept, so it cannot be made again. "
            "Pass the base that was written with the adapter."
        )
    try:
        recorded = Calibration.from_dict(provenance.calibration)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"The calibration in {adapter / 'quailora.json'} is damaged: {error!r}.") from error
    if text is not None:
        return replace(recorded, text=replace(recorded.text, source=text))
    if recorded.text.source is not None:
        raise CalibrationError(
            f"The base of {adapter} was calibrated on {recorded.text.source!r}. Pass that text as `calibration`, so "
            "that the same base can be made again."
        )
    return recorded


def check_measured_on(
    adapter: Path, provenance: Provenance, found: Mapping[str, BaseIdentity], chosen: ChosenBase, *, any_base: bool
) -> None:
    """Compare a base with the one that an adapter was made for.

    Args:
        adapter: folder of the adapter.
        provenance: what the adapter's folder says about its base.
        found: identity of the layers of the base that the adapter depends on.
        chosen: the base that the adapter is measured on.
        any_base: whether the caller wants to measure on this base even if it is another one.

    Raises:
        ModelError: if it is another base.
    """
    if provenance.origin is None:
        return
    # Hashes say whether anything differs; the distance says how much. A model loaded in another dtype has a few other
    # codes, which the adapter does not notice. Another block size moves a large share of the error that the adapter
    # makes up for.
    if provenance.incomparable(found):
        logger.warning("%s", untold(adapter, chosen.title))
        return
    different, distance = provenance.different(found), provenance.distance(found)
    if not different:
        return
    difference = f"{adapter} was not made for {chosen.title}: {described(provenance, different)}; {share(distance)}"
    if distance > _NEARLY and not any_base:
        raise ModelError(
            f"{difference}. Check the model, and the quantizer or the base if you name one. `evaluate` and `load` take "
            "another base all the same with `any_base=True`."
        )
    logger.warning("%s. A model loaded in another dtype or on another device has slightly other codes.", difference)


def described(provenance: Provenance, different: list[str]) -> str:
    """Return a few words about the layers that differ."""
    if not provenance.layers:
        total = provenance.origin.layers if provenance.origin else 0
        return f"its {total} layers, taken together, have other codes or scales"
    many = f"{len(different)} of {len(provenance.known)} layers"
    return f"{many} have other codes or scales than those that it makes up for, {different[0]} first"


def share(distance: float) -> str:
    """Return how large a difference between two bases is, in words."""
    if math.isinf(distance):
        return (
            "how much is different cannot be told, since an earlier version of quailora noted only a hash of each "
            "layer, and another number of threads or another device can change the last digits of scales"
        )
    return f"what is different is about {distance:.0%} of the quantization error that it makes up for"


def untold(adapter: Path, base: str) -> str:
    """Return what to say about a base that cannot be compared with the one that an adapter was made for."""
    return (
        f"Whether {adapter} belongs on {base} cannot be told: an earlier version of quailora, which made the adapter, "
        "noted no more than hashes of codes and scales, which a base in dequantized form does not have."
    )
