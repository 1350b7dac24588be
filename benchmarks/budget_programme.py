"""How long the integer programme of `quailora plan` takes for the layers of a large model.

    python benchmarks/budget_programme.py --blocks 32 --hidden 4096 --intermediate 11008

Errors are made up: those of each layer fall by about four for each bit, and with the rank, with noise on everything.
It prints the seconds for several budgets, and how far each solution is above the bound of the linear relaxation.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import eye, kron

from quailora.budget.programme import cheapest
from quailora.support.choices import PLANNED_RANKS

BITS = {2: 2.56, 3: 3.30, 4: 4.31, 4.4: 4.63, 8: 8.01}
"""Bits of a weight that errors are made up for, with those that are stored. 4.4 stands for 4 bits in smaller groups."""


def problem(blocks, hidden, intermediate, seed=0):
    """Return costs and bytes of each choice in each layer, and the number of weights."""
    generator = np.random.default_rng(seed)
    shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    costs, sizes = [], []
    for rows, columns in shapes * blocks:
        scale = generator.lognormal(sigma=1.0)
        decay = generator.uniform(0.002, 0.03)
        cost, size = [], []
        for bits, stored in BITS.items():
            noise = generator.lognormal(sigma=0.1)
            for rank in PLANNED_RANKS:
                cost.append(scale * noise * 3.9 ** (3 - bits) * np.exp(-decay * rank))
                size.append(rows * columns * stored / 8 + 2 * rank * (rows + columns))
        costs.append([*cost, 0.0])
        sizes.append([*size, 2.0 * rows * columns])
    weights = blocks * sum(rows * columns for rows, columns in shapes)
    return np.array(costs), np.array(sizes), weights


def relaxed(costs, sizes, budget):
    """Return the least cost if layers could be mixtures of choices, which no plan goes below."""
    layers, choices = costs.shape
    one_each = kron(eye(layers), np.ones((1, choices)))
    found = linprog(costs.ravel(), sizes.reshape(1, -1), [budget], one_each, np.ones(layers), bounds=(0, 1))
    return found.fun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.75, 3.5, 4.0, 4.5, 6.0])
    options = parser.parse_args()
    costs, sizes, weights = problem(options.blocks, options.hidden, options.intermediate)
    print(f"{len(costs)} layers, {costs.shape[1]} choices each, {weights / 1e9:.1f} billion weights")
    for bits in options.budgets:
        budget = bits * weights / 8
        began = time.perf_counter()
        chosen = cheapest(costs, sizes, budget)
        seconds = time.perf_counter() - began
        rows = np.arange(len(costs))
        cost, bound = costs[rows, chosen].sum(), relaxed(costs, sizes, budget)
        used = 8 * sizes[rows, chosen].sum() / weights
        print(f"{bits:.2f} bits: {seconds:.2f} s, {used:.4f} bits used, {cost / bound - 1:.1e} above the bound")


if __name__ == "__main__":
    main()
