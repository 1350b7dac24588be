"""Several trained adapters of one start in one adapter, in which the start counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..errors import ConfigurationError
from ..support.files import StrPath, as_str, check_writable, folder_of, new_folder, write_json, write_tensors
from ..support.inputs import check_inputs
from .change import EARLIER, TrainedChange
from .convert import Conversion, original_model
from .convert_linear import is_plain_lora
from .given import AdapterGiven
from .provenance import digest_of, read_provenance
from .saved import A, B, SavedAdapter
from .stacked import Part, parts_of, stacked

_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices")
"""Settings of PEFT that say which of the target modules get an adapter, and which tokens."""


def combine(
    adapters: Sequence[AdapterGiven],
    factors: Sequence[float] = (),
    *,
    out: StrPath,
    on: Literal["quantized base", "full precision"] = "quantized base",
    initial: StrPath | None = None,
    model: StrPath | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write one LoRA adapter that adds `sum_i c_i change_i`, and on the quantized base the common start once.

    Adapters that were trained from one start of `init` all hold the correction of their base. PEFT's
    `add_weighted_adapter` adds it as often as the factors say: 1.4 times with two factors of 0.7. That is wrong unless
    the factors add up to 1. Here it counts once on the quantized base, and not at all in full precision.

    Args:
        adapters: hub names or folders of the trained adapters, or models with them, all of them by LoRA.
        factors: the factor `c_i` of each; 1 for each if empty. A negative one takes away what a training has added.
        out: folder for the new adapter.
        on: what the new adapter is for: the "quantized base" of the others, or the model in "full precision".
        initial: the adapter that all trainings started from, "zero" if it added nothing; looked for if None.
        model: the full-precision model, as an adapter for it shall name it; by default what `init` was given.
        overwrite: replace a result that is in the folder.

    Raises:
        ConfigurationError: if adapters are not by LoRA, were trained from different starts, or a factor is missing.
    """
    changes = [TrainedChange.read(adapter, initial) for adapter in adapters]
    weights = factors_of(changes, factors)
    before = common_start(changes)
    parts = [part for change, weight in zip(changes, weights, strict=True) for part in parts_of(change, weight)]
    tensors, sizes = stacked(summed(parts))
    target = folder_of(out)
    check_writable(target)
    check_inputs(target, [*(change.trained.folder for change in changes), initial, model])
    # The layers of the new adapter are named one by one.
    config = {**changes[0].trained.config, "auto_mapping": None, "init_lora_weights": True, **dict.fromkeys(_WHERE)}
    with new_folder(target, overwrite) as folder:
        # On the base the change alone lies in a folder of its own, as `rebase` leaves it, so that the combined adapter
        # can be merged or moved like any other one.
        change_folder = folder
        if on == "quantized base":
            change_folder = folder / EARLIER
            change_folder.mkdir()
        name = as_str(model) or (original_model(before) if before is not None else config["base_model_name_or_path"])
        write_json(change_folder / "adapter_config.json", config | sizes | {"base_model_name_or_path": name})
        write_tensors(change_folder / "adapter_model.safetensors", tensors)
        if on == "quantized base":
            # An earlier training that the start holds is among the parts already.
            earlier = changes[0].earlier
            start = [] if before is None else [(before, 1.0)]
            start += [] if earlier is None else [(saved, -factor) for saved, factor in parts_of(earlier, 1.0)]
            whole, whole_sizes = stacked(summed([*parts, *start]))
            origin = read_provenance(before.folder).origin if before is not None else None
            if origin is not None:  # whose frozen directions are no longer the first ones
                noted = replace(origin, initial=digest_of(whole), holds=digest_of(tensors), frozen_rank=None, frozen="")
                config |= noted.as_config()
            write_json(folder / "adapter_config.json", config | whole_sizes)
            write_tensors(folder / "adapter_model.safetensors", whole)
            sizes, tensors = whole_sizes, whole
    return Conversion(target, int(sizes["r"]), len(tensors) // 2)


def factors_of(changes: Sequence[TrainedChange], factors: Sequence[float]) -> tuple[float, ...]:
    """Return the factor of each change: those that are given, or 1 for each.

    Raises:
        ConfigurationError: if there are no adapters, or not a factor for each.
    """
    if not changes:
        raise ConfigurationError("Expected at least one trained adapter, got none.")
    weights = tuple(factors) or (1.0,) * len(changes)
    if len(weights) != len(changes):
        raise ConfigurationError(f"Expected a factor for each of {len(changes)} adapters, got {len(weights)}.")
    return weights


def common_start(changes: Sequence[TrainedChange]) -> SavedAdapter | None:
    """Return the start of all changes; None if none of them added anything at first.

    Raises:
        ConfigurationError: if one is not by LoRA, or they have different starts.
    """
    for change in changes:
        if not is_plain_lora(change.trained) or change.modules:
            raise ConfigurationError(
                f"Expected plain LoRA without modules that were trained whole, got {change.trained.folder}. "
                "Write the merged model of a single adapter: convert with `merge=True`, or quailora.merge_full."
            )
        beside = [key for key in change.trained.tensors if not key.endswith((A, B))]
        if beside:
            raise ConfigurationError(
                f"Expected only lora_A.weight and lora_B.weight in {change.trained.folder}, got {beside[0]}, which "
                "cannot be weighed. Write the merged model of a single adapter: convert with `merge=True`."
            )
        if len(changes) > 1:
            check_alone(change)
    digests = {None if change.before is None else change.before.digest for change in changes}
    if len(digests) > 1:
        raise ConfigurationError(
            "Expected adapters that were trained from one start, got several starts. Convert each of them by itself: "
            "the results are adapters for the full-precision model, which PEFT can add up."
        )
    return changes[0].before


def check_alone(change: TrainedChange) -> None:
    """Raise a `ConfigurationError` if the start of an adapter holds the change of an earlier training."""
    if change.earlier is not None:
        raise ConfigurationError(
            f"The start of {change.trained.folder} holds the change of an earlier training besides its correction, "
            "which would count once for each adapter. Write the merged model of this adapter alone."
        )


def summed(parts: Sequence[Part]) -> list[Part]:
    """Return parts in which each adapter comes once, with the sum of its factors, and none with the factor 0."""
    # The start comes with the factor -c from each change and with 1 on the base: one part in place of several keeps the
    # rank low, and a sum of zero leaves it out.
    found: dict[str, Part] = {}
    for saved, factor in parts:
        before = found.get(saved.digest, (saved, 0.0))[1]
        found[saved.digest] = saved, before + factor
    kept = [part for part in found.values() if part[1] != 0]
    return kept or list(found.values())[:1]
