"""The integer programme that chooses for all layers at once, solved by HiGHS."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..errors import ConfigurationError

logger = logging.getLogger("quailora")

_GAP = 1e-4  # share of the optimum by which a solution may be above it
_LARGEST = 1e4  # the largest cost as the solver sees it
_STOPPED = 1  # the solver's status at its limit of time
_SECONDS = 60.0  # that the solver may take; models of a hundred billion weights take less than ten


def cheapest(
    costs: Float[ndarray, "layers choices"],
    sizes: Float[ndarray, "layers choices"],
    budget: float,
    alike: Sequence[tuple[Sequence[int], Int[ndarray, " choices"]]] = (),
    amount: Callable[[float], str] = "{:.4g}".format,
) -> Int[ndarray, " layers"]:
    """Return the choice for each layer with which the costs add up to least, while the sizes stay within a budget.

    This is the multiple-choice knapsack problem. With the costs as `sizes`, the sizes as `costs` and a bound on the
    divergence as `budget` it finds the smallest model of a quality.

    Args:
        costs: what each choice costs in each layer; infinite where a layer cannot have a choice.
        sizes: what it takes of the budget.
        budget: what all layers may take together.
        alike: numbers of layers that must have choices of the same kind, each with the kind of every choice.
        amount: writes sizes and budgets with their unit, for messages.

    Raises:
        ConfigurationError: if even the smallest choices exceed the budget, or the solver finds nothing in a minute.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = costs.shape
    # One variable of 0 or 1 for each layer and choice. Choices that cost infinitely much are bounded by 0.
    usable = np.isfinite(costs).ravel()
    scaled = np.where(usable, costs.ravel(), 0.0)
    # The solver also ends when a solution is within 1e-6 of the optimum in absolute terms, and costs of layers differ
    # by orders of magnitude. They are scaled so that this is little to the smallest.
    unit_cost = (np.abs(scaled).max() or 1.0) / _LARGEST
    # In each layer exactly one is chosen, and all together stay within the budget.
    one_each = sparse.kron(sparse.eye(layers), np.ones((1, choices)))
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    unit = max(abs(budget), 1e-300) / layers
    constraints.append(LinearConstraint(sizes.reshape(1, -1) / unit, -np.inf, budget / unit))
    rows = same_kind(layers, choices, alike)
    if rows is not None:
        constraints.append(LinearConstraint(rows, 0, 0))
    with silenced():
        result = milp(
            scaled / unit_cost,
            integrality=np.ones(layers * choices),
            bounds=Bounds(0, usable.astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if result.x is None:
        least = np.where(usable.reshape(costs.shape), sizes, np.inf).min(1).sum()
        if not math.isfinite(least):
            found = "some layers can have none of these choices"
        elif least > budget:
            found = f"the smallest takes {amount(least)}, and the budget leaves {amount(budget)} for them"
        elif result.status == _STOPPED:
            found = f"the solver found none in {_SECONDS:.0f} seconds"
        else:
            found = "none of those does that quantize layers alike which have to be"
        raise ConfigurationError(
            f"No choice for the layers stays within the budget: {found}. Raise the budget, or give fewer bits or lower "
            "ranks to choose from."
        )
    if result.status == _STOPPED:
        logger.warning(
            "The solver stopped after %.0f seconds. A better plan may cost %.2g less than this one, as a share of it.",
            _SECONDS,
            result.mip_gap,
        )
    chosen: Int[ndarray, " layers"] = result.x.reshape(costs.shape).argmax(1)
    return chosen


@contextmanager
def silenced() -> Iterator[None]:
    """Let nothing be printed on standard output inside a `with` statement, by libraries in C++ either."""
    # HiGHS prints lines about its own work there, whatever it is told, and past `sys.stdout`.
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 # no path of a file
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def same_kind(layers: int, choices: int, alike: Sequence[tuple[Sequence[int], Int[ndarray, " choices"]]]) -> Any:
    """Return the rows of constraints that give layers choices of the same kind, as a sparse matrix; None without any.

    Each row is the indicator of a kind in one layer less that in the next one, which has to be zero.
    """
    from scipy import sparse

    rows: list[Any] = []
    for members, kinds in alike:
        for first, second in pairwise(members):
            for kind in np.unique(kinds)[:-1]:  # the last one follows, since every layer has one choice
                row = np.zeros((layers, choices))
                row[first], row[second] = kinds == kind, -1.0 * (kinds == kind)
                rows.append(sparse.csr_array(row.reshape(1, -1)))
    return sparse.vstack(rows) if rows else None
