"""Choose for all layers at once, and compare the plan with what is the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..errors import ConfigurationError
from ..models.layers import block_of, ending
from ..support.machine import size
from .choices import Choice, PlannedLayer
from .measurements import Measurements
from .plan import Budget, BudgetPlan
from .programme import cheapest

FUSED: tuple[frozenset[str], ...] = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
"""Layers that serving engines compute as one, for which they have to be quantized alike."""


@final
@dataclass(frozen=True)
class Point:
    """One budget, and what it buys in each way.

    Attributes:
        bits: bits of each weight, adapters included.
        plan: expected divergence of the plan, in nats per token.
        uniform: that of the best choice which is the same for all layers; None if none is as small.
        uniform_title: this choice in words.
        skipping: that of one quantizer, no adapter and some layers in full precision; None likewise.
    """

    bits: float
    plan: float
    uniform: float | None
    uniform_title: str
    skipping: float | None


@final
@dataclass(frozen=True, eq=False)
class Planner:
    """Makes plans from measurements, which takes seconds.

    For example:

        measured = quailora.measure_choices("org/model", "text.txt", around="4bits")
        plan = quailora.Planner(measured).of_budget("3.5bits")
        quailora.initialize_model("org/model", plan.method(), "text.txt", targets=plan.targets, out="adapter")

    Attributes:
        measurements: the layers of the model as they were measured.
        fused: whether layers that serving engines compute as one are quantized alike; see `FUSED`.
        allowed: the measured choices to choose from; all if None.
    """

    measurements: Measurements
    fused: bool = False
    allowed: Sequence[Choice] | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices to choose from."""
        known = self.measurements.choices
        return known if self.allowed is None else tuple(choice for choice in known if choice in self.allowed)

    def of_budget(self, budget: Budget | str) -> BudgetPlan:
        """Return the plan of the least expected divergence that stays within a budget.

        Args:
            budget: `3.5bits` for each weight of the layers, adapters included; or `2GiB`, for the whole model.

        Raises:
            ConfigurationError: if no plan stays within it, or it is none.
        """
        budget = Budget(budget) if isinstance(budget, str) else budget
        return self.within(budget.nbytes(self.measurements.weights, self.measurements.other_bytes), budget.text)

    def within(self, nbytes: float, asked: str, allowed: Sequence[Choice] | None = None) -> BudgetPlan:
        """Return the plan of the least expected divergence that stays within a number of bytes.

        Args:
            nbytes: bytes of the layers with their adapters.
            asked: the budget in words.
            allowed: the choices to choose from; those of the planner if None.

        Raises:
            ConfigurationError: if no plan stays within it.
        """
        known = self.measurements
        costs = self._costs(self.choices if allowed is None else allowed)

        def amount(nbytes: float) -> str:
            return f"{known.bits(nbytes):.2f} bits a weight ({size(max(0, int(nbytes)))})"

        return self._plan(cheapest(costs, known.sizes, nbytes, self._alike, amount), asked)

    def of_quality(self, divergence: float) -> BudgetPlan:
        """Return the smallest plan whose expected divergence stays within a bound, in nats per token.

        Raises:
            ConfigurationError: if there is none, or the bound is not above 0.
        """
        check_quality(divergence)
        costs = self._costs(self.choices)
        sizes = np.where(np.isfinite(costs), self.measurements.sizes, np.inf)
        return self._plan(
            cheapest(sizes, np.nan_to_num(costs, posinf=0.0), divergence, self._alike, "{:.3g} nats".format),
            f"{divergence:g} nats per token",
        )

    def uniform(self, nbytes: float) -> tuple[Choice, float] | None:
        """Return the best choice that is the same for all layers and stays within a number of bytes.

        Ranks that small layers cannot carry are lowered there to the largest measured one that they can.

        Returns:
            The choice and its expected divergence; None if there is no choice as small as that.
        """
        # A larger choice is not always better on held-out tokens, so all that fit are compared.
        found = []
        for choice in self.choices:
            chosen = self.measurements.everywhere(choice)
            rows = np.arange(len(chosen))
            cost = self.measurements.expected(list(chosen))
            if math.isfinite(cost) and self.measurements.sizes[rows, chosen].sum() <= nbytes:
                found.append((cost, choice))
        return min(((choice, cost) for cost, choice in found), key=lambda one: one[1], default=None)

    def nbytes_of(self, choice: Choice) -> float:
        """Return the bytes of all layers with the same choice; infinite if a layer cannot have its quantizer."""
        chosen = self.measurements.everywhere(choice)
        sizes = self.measurements.sizes[np.arange(len(chosen)), chosen]
        return float(sizes.sum()) if math.isfinite(self.measurements.expected(list(chosen))) else math.inf

    def skipping(self, nbytes: float) -> BudgetPlan | None:
        """Return the best plan without adapters that has one quantizer and some layers in full precision.

        Returns:
            None if no such plan is as small as that.
        """
        # The rival of every adapter: the same bytes are spent on some layers in 16 bits, chosen by the same programme.
        plans = []
        for quantizer in dict.fromkeys(choice.quantizer for choice in self.choices if choice.quantizer):
            allowed = Choice(quantizer), Choice(None)
            if set(allowed) <= set(self.choices):
                with suppress(ConfigurationError):  # where not even the smallest of these plans is as small as that
                    plans.append(self.within(nbytes, f"{nbytes:.0f} bytes", allowed))
        return min(plans, key=lambda plan: plan.divergence, default=None)

    def frontier(self, bits: Sequence[float] = ()) -> list[Point]:
        """Return what budgets buy, from small to large.

        Args:
            bits: bits of each weight of the budgets; by default those of every choice that is the same for all layers.
        """
        known = self.measurements
        sizes = [nbytes for nbytes in map(self.nbytes_of, self.choices) if math.isfinite(nbytes)]
        asked = bits or sorted({round(known.bits(nbytes), 4) for nbytes in sizes})
        # Budgets of the uniform choices show what each of these could have been for the same bytes.
        points = []
        for one in asked:
            nbytes = one * known.weights / 8 * (1 + 1e-4)  # what was rounded to four digits still fits
            try:
                plan = self.within(nbytes, f"{one:.2f} bits")
            except ConfigurationError:  # fewer bits than the smallest choice of each layer takes
                continue
            uniform, skipping = self.uniform(nbytes), self.skipping(nbytes)
            points.append(
                Point(
                    one,
                    plan.divergence,
                    None if uniform is None else uniform[1],
                    "" if uniform is None else uniform[0].title,
                    None if skipping is None else skipping.divergence,
                )
            )
        return points

    def _costs(self, allowed: Sequence[Choice]) -> Float[ndarray, "layers choices"]:
        """Return what choices cost, infinitely much where they are not allowed."""
        usable = [choice in allowed for choice in self.measurements.choices]
        return np.where(usable, self.measurements.costs, np.inf)

    @cached_property
    def _alike(self) -> list[tuple[list[int], Int[ndarray, " choices"]]]:
        """Layers that have to be quantized alike, with the number of the quantizer of each choice."""
        if not self.fused:
            return []
        quantizers = [choice.quantizer for choice in self.measurements.choices]
        kinds = np.array([quantizers.index(quantizer) for quantizer in quantizers])
        groups: dict[tuple[str, frozenset[str]], list[int]] = {}
        for number, name in enumerate(self.measurements.layers):
            for together in FUSED:
                if ending(name) in together:
                    groups.setdefault((block_of(name), together), []).append(number)
        return [(members, kinds) for members in groups.values() if len(members) > 1]

    def _plan(self, chosen: Int[ndarray, " layers"], asked: str) -> BudgetPlan:
        known = self.measurements
        layers = {
            name: PlannedLayer(
                known.choices[choice],
                layer.shape[0] * layer.shape[1],
                layer.nbytes[choice],
                float(known.costs[number, choice]),
            )
            for number, ((name, layer), choice) in enumerate(zip(known.layers.items(), chosen, strict=True))
        }
        expected = known.expected(list(chosen))
        return BudgetPlan(known.model, asked, layers, expected, known.other_bytes, known.others, known.recipe)


def check_quality(divergence: float) -> None:
    """Raise a `ConfigurationError` unless a divergence is one that a plan may have."""
    if not 0 < divergence < math.inf:
        raise ConfigurationError(f"Expected a divergence above 0 as quality, got {divergence}. Try 0.1.")
