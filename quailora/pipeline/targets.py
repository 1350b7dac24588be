"""Choose the layers that get an adapter: those that were asked for, that text reaches, and that stock PEFT can load."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from ..adapters.lora import LoraScaling, pattern_key
from ..adapters.peft_check import unusable_layers
from ..bases import ExistingBase
from ..calibration.empty_pass import Reach, find_reach
from ..errors import TargetError
from ..families import Family, Lora
from ..methods.method import Method
from ..models.layers import (
    Layer,
    all_layers,
    base_layers,
    ending,
    kind,
    named_layers,
    select_layers,
    stock_quantizes,
)
from .checks import check_scaling

logger = logging.getLogger("quailora")

_SHOWN = 8  # names in a message


@final
@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """What an adapter consists of.

    Attributes:
        layers: the layers that get an adapter, of a model without weights.
        scaling: their ranks and alphas; no rank is above the smaller side of its layer.
        reach: what text does to the linear layers of the model.
    """

    layers: Mapping[str, Layer]
    scaling: LoraScaling
    reach: Reach

    def of(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Return those of a loaded model's layers that get an adapter."""
        return {name: layer for name, layer in layers.items() if name in self.layers}


def plan_adapter(
    model: Any,
    targets: Sequence[str],
    scaling: LoraScaling,
    base: ExistingBase | None = None,
    *,
    family: Family = Lora(),  # noqa: B008 # frozen
    stock: bool = False,
    wrapped: bool = False,
    kept: Collection[str] = (),
) -> AdapterPlan:
    """Return what an adapter for these targets consists of, found on a model without weights.

    Layers that cannot be used are left out with a warning where `all-linear` or `experts` meant them.

    Args:
        model: the model without weights; it is left as it was.
        targets: names or kinds of layers; see `select_layers`.
        scaling: ranks and alphas that were asked for.
        base: the base, if it is quantized already; its maker has decided which layers are quantized.
        family: the kind of adapter.
        stock: whether stock transformers will quantize the base while it loads it, and decides likewise.
        wrapped: whether PEFT has put the adapter into a model already, so that it need not be asked whether it can.
        kept: names of layers that the base keeps in full precision, so that there is nothing to correct.

    Raises:
        TargetError: if a target matches nothing, names a layer that cannot be used, or one too small for its rank.
        ModelError: if stock PEFT cannot load an adapter for the layers that are left.
    """
    chosen = select_layers(model, targets)
    named = named_layers(chosen, targets)
    # In the order of what costs least to find out: what text does not reach, what the base does not quantize, and what
    # stock PEFT does not load. Ranks are fitted before PEFT is asked, since they are part of the adapter that it is
    # given.
    reach = find_reach(model)
    reasons = {name: "text never reaches them" for name in chosen if name in reach.silent}
    reasons |= {name: "they do not turn one input into one output" for name in chosen if name in reach.odd}
    linear = {name: layer for name, layer in chosen.items() if layer.expert is None and name not in reasons}
    reasons |= unquantized(linear, base, stock=stock)
    reasons |= {name: "the base keeps them in full precision" for name in chosen if name in kept}
    left = {name: layer for name, layer in chosen.items() if name not in reasons}
    fitted = fit_ranks(left, named, scaling, family)
    if left:
        check_scaling(left, fitted, family)
    if not wrapped:
        reasons |= unusable_layers(model, left, fitted, family, run=reach.known)
    left = {name: layer for name, layer in left.items() if name not in reasons}
    refuse(model, reasons.keys() & named, reasons, left)
    for reason, names in by_reason(reasons).items():
        logger.warning("Leaving out %d layers: %s. They are: %s.", len(names), reason, in_short(names))
    if not left:
        raise TargetError(f"No layer is left that could get an adapter: {next(iter(reasons.values()))}.")
    check_scaling(left, fitted, family)
    tell_ranks(left, scaling, fitted)
    return AdapterPlan(left, fitted, reach)


def unquantized(layers: Mapping[str, Layer], base: ExistingBase | None, *, stock: bool) -> dict[str, str]:
    """Return the linear layers that a base which this run does not write has in full precision, with the reason.

    A base that is quantized already has to quantize a kind of layers in all blocks or in none, which is checked later.
    """
    if base is not None:
        kinds = {kind(name) for name in base.among(layers)}
        kept = [name for name in layers if kinds and kind(name) not in kinds]
        return dict.fromkeys(kept, f"they are not quantized in {base.title!r}")
    kept = [name for name, layer in layers.items() if stock and not stock_quantizes(layer)]
    return dict.fromkeys(kept, "stock transformers leaves them in full precision, see `save_base`")


def refuse(model: Any, named: set[str], reasons: Mapping[str, str], left: Mapping[str, Layer]) -> None:
    """Raise a `TargetError` if layers were named that cannot be used; it says what to name instead."""
    if not named:
        return
    whys = by_reason({name: reasons[name] for name in reasons if name in named})
    said = "; ".join(f"{in_short(names)} ({reason})" for reason, names in whys.items())
    targets = typed_targets(model, left)
    shown = targets if 0 < len(targets) <= _SHOWN else ["all-linear"]
    raise TargetError(f"{len(named)} of the target layers cannot get an adapter: {said}. Try `targets={shown}`.")


def typed_targets(model: Any, layers: Mapping[str, Layer]) -> list[str]:
    """Return the shortest endings of names that mean these layers and no others, as `--targets` takes them."""
    wanted = {layer.group for layer in layers.values()}
    others = {layer.group for layer in all_layers(model).values()} - wanted
    targets: dict[str, None] = {}
    for group in sorted(wanted):
        parts = group.split(".")
        endings = [".".join(parts[index:]) for index in reversed(range(len(parts)))]
        targets[
            next((each for each in endings if not any(f".{other}".endswith(f".{each}") for other in others)), group)
        ] = None
    return list(targets)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the layers with each reason."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    return layers


def in_short(names: Sequence[str]) -> str:
    """Return layers by kind, with the number of each kind: `down_proj (24), gate (1)`."""
    kinds = [kind(name) for name in names]
    counted = [f"{one} ({kinds.count(one)})" for one in dict.fromkeys(kinds)]
    return ", ".join(counted[:_SHOWN]) + (", ..." if len(counted) > _SHOWN else "")


def fit_ranks(
    layers: Mapping[str, Layer],
    named: set[str],
    scaling: LoraScaling,
    family: Family = Lora(),  # noqa: B008 # frozen
) -> LoraScaling:
    """Return a scaling in which layers smaller than the rank have the largest rank that they can carry.

    The factor `s` of these layers stays as it was. Layers that were named, or have a rank of their own, keep it, and
    all do if none can carry it, or if PEFT has one rank for all layers of the family.
    """
    if not family.has_patterns:
        return scaling
    limits = {layer.group: min(layer.shape) for layer in layers.values()}
    kept = {layer.group for name, layer in layers.items() if name in named}
    small = {
        group: limit
        for group, limit in limits.items()
        if limit < scaling.rank and group not in kept and pattern_key(scaling.rank_pattern, group) == group
    }
    if len(small) == len(limits):
        return scaling
    # A pattern by the ending of a name is short, but means every layer with that ending. It is used where all of them
    # need the same rank and scale; otherwise the full name is.
    keys: dict[str, str] = {}
    for group in small:
        alike = [other for other in limits if ending(other) == ending(group)]
        uniform = len({(small.get(other), scaling.scale_of(other)) for other in alike}) == 1
        keys[ending(group) if uniform else group] = group
    ranks = {key: small[group] for key, group in keys.items()}
    alphas = {key: scaling.alpha_for(small[group], scaling.scale_of(group)) for key, group in keys.items()}
    return replace(
        scaling,
        rank_pattern=ranks | {key: rank for key, rank in scaling.rank_pattern.items() if key not in ranks},
        alpha_pattern=alphas | {key: alpha for key, alpha in scaling.alpha_pattern.items() if key not in alphas},
    )


def tell_ranks(layers: Mapping[str, Layer], asked: LoraScaling, fitted: LoraScaling) -> None:
    """Say which layers got a lower rank than was asked for."""
    lowered: dict[int, list[str]] = {}
    for layer in layers.values():
        if fitted.rank_of(layer.group) != asked.rank_of(layer.group):
            lowered.setdefault(fitted.rank_of(layer.group), []).append(layer.name)
    for rank, names in lowered.items():
        logger.warning("Rank %d, the largest they can carry, for: %s.", rank, in_short(names))


def with_kept(model: Any, quantized: Collection[str], kept: Collection[str]) -> dict[str, Layer]:
    """Return the layers of a model that are quantized, and those that were to stay in full precision beside them."""
    return {name: layer for name, layer in all_layers(model).items() if name in quantized or name in kept}


def layers_of_run(model: Any, corrected: Mapping[str, Layer], method: Method, *, save_base: bool) -> dict[str, Layer]:
    """Return the layers that a run quantizes, with or without a correction.

    Those without one are quantized if the base is written, if later layers are to see what they have become, or if all
    corrections are trained together afterwards.

    Args:
        model: the full-precision model.
        corrected: the layers that get a correction.
        method: how layers are initialized.
        save_base: whether the base is written.
    """
    if not save_base and method.inputs == "full" and method.distillation is None:
        return dict(corrected)
    layers = quantized_layers(model, corrected, method.base, method.kept)
    if save_base or method.base is not None:
        return layers
    return {name: layer for name, layer in layers.items() if name in corrected or stock_quantizes(layer)}


def quantized_layers(
    model: Any, chosen: Mapping[str, Layer], base: ExistingBase | None, kept: Collection[str] = ()
) -> dict[str, Layer]:
    """Return every layer that the base of a model has in quantized form, chosen or not.

    Args:
        model: the full-precision model.
        chosen: the layers that get a correction.
        base: the base, if it is quantized already.
        kept: names of layers that stay in full precision.
    """
    layers = {name: layer for name, layer in base_layers(model, chosen).items() if name not in kept}
    return layers if base is None else base.among(layers)
