"""A budget plan: what each layer of a model becomes, as a file, and as the method that makes it so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import final

from ..adapters.lora import LoraScaling
from ..errors import ConfigurationError, ModelError
from ..methods.method import Method
from ..methods.recipes import find_recipe, resolved_name
from ..models.files import read_json
from ..models.layers import ending
from ..quantizers import Quantizer
from ..support.files import StrPath, write_json
from ..support.machine import parse_size
from ..support.tables import markdown_table
from .choices import PlannedLayer

STOCK_RECIPE = "best"
"""The recipe of plans for a base that is not written, because bitsandbytes makes it while it loads the model."""

PLAN_FILE = "plan.json"
"""Name of the plan in the folder that `quailora plan` writes."""

_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", re.IGNORECASE)


@final
@dataclass(frozen=True)
class Budget:
    """How much a model may take.

    Attributes:
        text: as it was typed: `3.5bits`, for each weight of the layers, adapter included; or `2GiB`, for the whole
            model with its adapter.
    """

    text: str

    def __post_init__(self) -> None:
        if self.bits is None:
            parse_size(self.text)
        elif not self.bits > 0:
            raise ConfigurationError(f"Expected a budget above 0 bits, got {self.text!r}.")

    @property
    def bits(self) -> float | None:
        """Bits for each weight; None for a budget in bytes."""
        match = _BITS.fullmatch(self.text)
        return None if match is None else float(match[1])

    def nbytes(self, weights: int, other_bytes: int) -> float:
        """Return the bytes that the layers and their adapters may take.

        Args:
            weights: number of weights in the layers.
            other_bytes: bytes of the rest of the model.
        """
        return parse_size(self.text) - other_bytes if self.bits is None else self.bits * weights / 8


@final
@dataclass(frozen=True, eq=False, repr=False)
class BudgetPlan:
    """What each layer of a model becomes.

    Attributes:
        model: hub name or folder of the model.
        asked: the budget or the quality that was asked for, in words.
        layers: the layers by name, in the order of the model.
        divergence: expected divergence of the predictions from full precision, in nats per token.
        other_bytes: bytes of the rest of the model.
        others: linear layers that were not measured, because they cannot have an adapter: they stay in full precision,
            or are what bitsandbytes makes of them while it loads the model.
        recipe: name of the recipe that the plan was made for.
        file: the file that the plan was read from, if it was.
    """

    model: str
    asked: str
    layers: Mapping[str, PlannedLayer]
    divergence: float
    other_bytes: int
    others: Mapping[str, PlannedLayer] = field(default_factory=dict)
    recipe: str = "best-joint"
    file: str | None = None

    def __repr__(self) -> str:
        return (
            f"BudgetPlan({self.model!r}, {self.asked!r}: {len(self.layers)} layers, {self.bits:.2f} bits a weight, "
            f"expected divergence {self.divergence:.3g})"
        )

    def _repr_markdown_(self) -> str:
        """Show the plan in a notebook."""
        return f"{self!r}\n\n{markdown_table(*self.table())}"

    def table(self) -> tuple[tuple[str, ...], list[list[str]]]:
        """Return the header and the rows of a table of what layers of each kind become, such as `down_proj`."""
        kinds: dict[str, list[PlannedLayer]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault(ending(name), []).append(layer)
        rows = []
        for kind, layers in kinds.items():
            bases = Counter(layer.choice.base for layer in layers)
            ranks = [layer.choice.rank for layer in layers]
            rows.append([
                kind,
                ", ".join(f"{count} x {base}" for base, count in sorted(bases.items())),
                f"{min(ranks)}-{max(ranks)}",
                f"{8 * sum(layer.nbytes for layer in layers) / sum(layer.weights for layer in layers):.2f}",
                f"{sum(layer.divergence for layer in layers):.3g}",
            ])
        return ("layers", "bases", "ranks", "bits a weight", "expected cost (nats)"), rows

    @property
    def nbytes(self) -> int:
        """Bytes of the layers with their adapters."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits(self) -> float:
        """Bits of each weight of the layers, adapters included."""
        return 8 * self.nbytes / sum(layer.weights for layer in self.layers.values())

    @property
    def targets(self) -> list[str]:
        """Names of the layers that get an adapter."""
        return [name for name, layer in self.layers.items() if layer.choice.rank]

    @cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer of most weights among those that are quantized.

        Raises:
            ConfigurationError: if every layer stays in full precision.
        """
        counted: Counter[Quantizer] = Counter()
        for layer in self.layers.values():
            if layer.choice.quantizer is not None:
                counted[layer.choice.quantizer] += layer.weights
        if not counted:
            raise ConfigurationError("Every layer of this plan stays in full precision, so nothing has to be made up.")
        return counted.most_common(1)[0][0]

    @property
    def quantizers(self) -> dict[str, Quantizer | None]:
        """Quantizers of the layers that have another one than most; None for layers in full precision."""
        usual = self.quantizer

        def unusual(layers: Mapping[str, PlannedLayer]) -> dict[str, Quantizer | None]:
            return {name: layer.choice.quantizer for name, layer in layers.items() if layer.choice.quantizer != usual}

        found = unusual(self.layers)
        # A base that bitsandbytes makes while it loads the model has no list of layers. It leaves out others by itself.
        stock = not found and usual.stock_config() is not None and self.recipe == STOCK_RECIPE
        return {} if stock else found | unusual(self.others)

    def method(self, recipe: str | None = None, scaling: LoraScaling = LoraScaling()) -> Method:  # noqa: B008 # frozen
        """Return the method that makes the layers what the plan says, to be run on `targets`.

        Args:
            recipe: name of the recipe that finds bases and corrections; that of the plan by default.
            scaling: its alpha, and whether it is rank-stabilised. PEFT's factor `s` is the same in all layers: that of
                this scaling's rank and alpha. Ranks are those of the plan.

        Raises:
            ConfigurationError: if no layer has an adapter, the scaling has patterns of its own, or the recipe cannot
                work with a quantizer.
        """
        if not self.targets:
            raise ConfigurationError(
                "No layer of this plan has an adapter. Plan with ranks above 0 only; with the `measurements` of this "
                "plan that takes no measuring."
            )
        if scaling.rank_pattern or scaling.alpha_pattern:
            raise ConfigurationError(
                "A budget plan decides the ranks of layers. Leave out rank_pattern, alpha_pattern."
            )
        # PEFT has one rank and one alpha for most layers, and patterns for the others. The factor s is the same in all
        # layers, so that training changes layers of all ranks alike.
        ranks = {name: self.layers[name].choice.rank for name in self.targets}
        usual, scale = Counter(ranks.values()).most_common(1)[0][0], scaling.scale_of("")
        special = {name: rank for name, rank in ranks.items() if rank != usual}
        chosen = replace(
            scaling,
            rank=usual,
            alpha=scaling.alpha_for(usual, scale),
            rank_pattern=special,
            alpha_pattern={name: scaling.alpha_for(rank, scale) for name, rank in special.items()},
        )
        recipe = recipe or self.recipe
        method = find_recipe(recipe).method(self.quantizer, chosen, quantizers=self.quantizers)
        sizes = {name: layer.weights for name, layer in {**self.layers, **self.others}.items()}
        return replace(method, recipe=resolved_name(recipe), budget=self.file, planned=sizes)

    def write(self, file: Path) -> None:
        """Write the plan as JSON."""
        content = {
            "model": self.model,
            "asked": self.asked,
            "bits": self.bits,
            "bytes": self.nbytes,
            "other_bytes": self.other_bytes,
            "recipe": self.recipe,
            "divergence": self.divergence,
            "layers": {name: layer.as_dict() for name, layer in self.layers.items()},
            "others": {name: layer.as_dict() for name, layer in self.others.items()},
        }
        write_json(file, content)

    @classmethod
    def read(cls, place: StrPath) -> BudgetPlan:
        """Read a plan from its file, or from the folder that `quailora plan` has written.

        Raises:
            ModelError: if it is missing or damaged.
        """
        path = Path(place).expanduser()
        file = path / PLAN_FILE if path.is_dir() else path
        content = read_json(file)
        try:
            layers, others = (
                {name: PlannedLayer.read(one) for name, one in content[part].items()} for part in ("layers", "others")
            )
            return cls(
                content["model"],
                content["asked"],
                layers,
                float(content["divergence"]),
                int(content["other_bytes"]),
                others,
                content["recipe"],
                str(file.resolve()),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is no budget plan, or damaged: {error!r}. Plan again.") from error
