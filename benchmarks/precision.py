"""What finite precision costs: a massive channel in float32, and a million tokens in bfloat16.

    python benchmarks/precision.py

Errors are `tr((E - C) H (E - C)^T)` in float64 with the exact Gram, relative to the optimum in float64.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli

from quailora import NF4, AlternatingLeastSquares, Gram, InputStatistics, Optimal
from quailora.core.metrics import Metric
from quailora.core.objective import Objective


def excess(solver, error: torch.Tensor, metric: Metric, exact: Gram, rank: int, optimum: float) -> float:
    """Return how far a solver's correction ends above the optimum, as a share of it."""
    found = solver.solve(error, metric, rank)
    return exact.energy(error.double() - found.lora_B.double() @ found.lora_A.double()) / optimum - 1


def main(width: int = 1024, rows: int = 1024, tokens: int = 2**20, rank: int = 32, batch: int = 4096) -> None:
    """Print both tables.

    Args:
        width: in_features.
        rows: out_features.
        tokens: calibration tokens.
        rank: rank of the correction.
        batch: tokens in one update.
    """
    for loudness in (1.0, 3000.0):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(width, width, generator=generator) / width**0.5
        weight = (0.02 * torch.randn(rows, width, generator=generator)).bfloat16()
        error = weight.float() - NF4().quantize(weight).dequantize().float()
        statistics = InputStatistics(width)
        exact_sum = torch.zeros(width, width, dtype=torch.float64)
        for _ in range(tokens // batch):
            latent = torch.randn(batch, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
            inputs = latent @ mixing
            inputs[:, width // 2] *= loudness
            inputs = inputs.bfloat16()
            statistics.update(inputs)
            exact_sum += inputs.double().T @ inputs.double()
        exact = Gram(exact_sum / tokens)
        power = exact.second_moment.diagonal().sqrt()
        worst = ((statistics.second_moment - exact.second_moment) / (power[:, None] * power)).abs().max().item()
        print(f"{tokens} bfloat16 tokens of width {width}, one channel x{loudness:.0f}:")
        print(f"  Gram: largest error {worst:.1e} of sqrt(H_ii H_jj)")
        double = Objective(error.double(), exact)
        values = torch.linalg.eigvalsh(exact.product(error.double()) @ error.double().T).flip(0)
        optimum = values[rank:].sum().item()
        gained = 1 - optimum / double.value_at_zero
        print(
            f"  rank {rank} of a bfloat16 weight under NF4 can take away {gained:.4%} of the error; above the optimum:"
        )
        for solver in (Optimal(), AlternatingLeastSquares(), AlternatingLeastSquares(iterations=100)):
            single = excess(solver, error, Gram(statistics.second_moment), exact, rank, optimum)
            reference = excess(solver, error.double(), exact, exact, rank, optimum)
            print(
                f"    {solver!r}: {single:.4%} in float32 with that Gram, {reference:.4%} in float64 with the exact one"
            )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
