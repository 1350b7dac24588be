"""What `quailora merge`, `rebase` and `convert` do: typed values from their options, and the library's functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.combine import combine
from ..adapters.convert import Conversion, convert
from ..calibration.sources import TextCalibration
from ..errors import ConfigurationError
from ..merging.full import FullModel, merge_full
from ..merging.merge import Merged, merge
from ..merging.rebase import Rebased, rebase
from ..merging.scales import ScaleTraining
from ..merging.training import MergeTraining
from ..methods.block_training import BlockTraining
from ..pipeline.options import Output, Resources
from ..quantizers import QUANTIZERS, Quantizer
from ..support.files import StrPath, as_str
from .initializing import calibration_of
from .measuring import texts_of


def run_convert(options: Mapping[str, Any]) -> Conversion | FullModel:
    """Write an adapter for the full-precision model, or the merged model, as options say.

    Args:
        options: every option of `quailora convert` by name.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    # One command for three results: the merged model, the sum of several changes, and the change of one adapter.
    adapters, factors = [options["adapter"], *options["add"]], numbers_of(options["factors"])
    shared = {name: options[name] for name in ("out", "initial", "model", "overwrite")}
    if options["merge"]:
        return merge_full(
            adapters,
            factors=factors,
            trained_on=base_named(options["trained_on"]),
            resources=Resources(options["dtype"], trust_remote_code=options["trust_remote_code"]),
            **shared,
        )
    if options["dtype"] != "auto":
        raise ConfigurationError(f"Expected `merge` with dtype={options['dtype']!r}: an adapter is in float32.")
    if options["add"] or factors:
        return combine(adapters, factors, on="full precision", **shared)
    return convert(options["adapter"], **shared)


def numbers_of(words: Sequence[str]) -> tuple[float, ...]:
    """Return words as numbers.

    Raises:
        ConfigurationError: if one is none, or not finite.
    """
    try:
        found = tuple(map(float, words))
    except ValueError as error:
        raise ConfigurationError(f"Expected numbers as `factors`, got {' '.join(words)}.") from error
    if not all(map(math.isfinite, found)):
        raise ConfigurationError(f"Expected finite numbers as `factors`, got {' '.join(words)}.")
    return found


def run_merge(options: Mapping[str, Any]) -> Merged:
    """Merge an adapter into a quantized model as options say.

    Args:
        options: every option of `quailora merge` by name, with an object for the format.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    return merge(
        options["adapter"],
        options["into"],
        out=Output(
            options["out"],
            overwrite=options["overwrite"],
            fresh=options["fresh"],
            base_format=options["base_format"],
        ),
        initial=options["initial"],
        model=options["model"],
        trained_on=base_named(options["trained_on"]),
        target=options["target"],
        calibration=TextCalibration(calibration_of(options)),
        texts=texts_of(options),
        max_kl=options["max_kl"],
        training=MergeTraining(BlockTraining(options["block_steps"]), ScaleTraining(options["scale_steps"])),
        resources=resources_of(options),
    )


def run_rebase(options: Mapping[str, Any]) -> Rebased:
    """Move an adapter onto another base as options say.

    Args:
        options: every option of `quailora rebase` by name, with an object for the quantizer.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    if (options["quantizer"] is None) == (options["base"] is None):
        came = "neither" if options["base"] is None else "both"
        raise ConfigurationError(f"Expected `base` or `quantizer` for the base to move to, got {came}.")
    return rebase(
        options["adapter"],
        out=Output(
            options["out"],
            overwrite=options["overwrite"],
            fresh=options["fresh"],
            save_base=options["save_base"],
            base_format=options["base_format"],
            factors_dtype=options["factors_dtype"],
            push_to_hub=options["push_to_hub"],
        ),
        initial=options["initial"],
        base=options["quantizer"] or as_str(options["base"]),
        model=options["model"],
        rank=options["rank"],
        recipe=options["recipe"],
        calibration=TextCalibration(calibration_of(options)),
        trained_on=base_named(options["trained_on"]),
        resources=resources_of(options),
    )


def base_named(given: StrPath | None) -> Quantizer | StrPath | None:
    """Return the base that was trained on: a quantizer by its short name, or a checkpoint."""
    return QUANTIZERS[str(given)]() if str(given) in QUANTIZERS else given


def resources_of(options: Mapping[str, Any]) -> Resources:
    """Return what of the machine options allow."""
    return Resources(
        options["dtype"],
        options["device"],
        options["offload"],
        options["memory_limit"],
        trust_remote_code=options["trust_remote_code"],
    )
