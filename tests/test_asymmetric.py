"""The asymmetric problem against plain least squares and against the data it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import lstsq, svd

from quailora import NF4, Initializer, InputStatistics, Optimal
from quailora.asymmetric import RIDGES, PairedMoments, choose_shrinkage, initialize_asymmetric, quantized_inputs
from quailora.errors import ConfigurationError


def problem(seed, tokens=400, rows=12, columns=16, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    quantized = full + noise * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, full, quantized


def output_error(moments, weight, other):
    """Return `E |W x - V x~|^2` from the moments: squared, total over outputs, per token."""
    weight, other = weight.double(), other.double()
    left, right = ((weight @ moments.full) * weight).sum(), ((other @ moments.quantized) * other).sum()
    return (left - 2 * ((weight @ moments.cross) * other).sum() + right).item()


def joint(full, quantized):
    return InputStatistics.from_inputs(torch.cat([full, quantized], dim=-1))


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_error_is_that_of_the_outputs(seed, rows, columns):
    weight, full, quantized = problem(seed, 50, rows, columns)
    other = weight + 0.1
    moments = PairedMoments(joint(full, quantized).second_moment)
    expected = (full @ weight.double().T - quantized @ other.double().T).square().sum() / 50
    assert output_error(moments, weight, other) == pytest.approx(expected.item(), rel=1e-9)


def shift(moments, weight, ridge):
    return moments.shift(moments.change(weight), ridge)


def test_target_without_ridge_is_that_of_least_squares():
    weight, full, quantized = problem(0)
    found = weight + shift(PairedMoments(joint(full, quantized).second_moment), weight, 0.0)
    expected, *_ = lstsq(quantized.numpy(), (full @ weight.double().T).numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected).T)


def test_a_large_ridge_is_the_weight_and_equal_inputs_ask_for_nothing():
    weight, full, quantized = problem(1)
    far = shift(PairedMoments(joint(full, quantized).second_moment), weight, 1e6)
    torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-4)
    same = PairedMoments(joint(full, full).second_moment)
    for ridge in RIDGES:
        nothing = shift(same, weight, ridge)
        torch.testing.assert_close(nothing, torch.zeros_like(nothing))


@given(seed=st.integers(0, 2**16))
def test_the_shrinkage_chosen_is_the_best_of_many(seed):
    weight, full, quantized = problem(seed, 60, 4, 6)
    fitted, judge = (
        PairedMoments(joint(full[part], quantized[part]).second_moment) for part in (slice(30), slice(30, 60))
    )
    ridge, share = choose_shrinkage(weight, fitted, judge)
    least = min(
        output_error(judge, weight, weight + step / 20 * shift(fitted, weight, each))
        for each in RIDGES
        for step in range(21)
    )
    assert output_error(judge, weight, weight + share * shift(fitted, weight, ridge)) <= least * (1 + 1e-9)


def test_reduced_rank_regression_against_scipy():
    """With the target `W*` and the metric `H~` the fast solver finds the best correction of the outputs themselves."""
    weight, full, quantized = problem(2)
    base = NF4(block_size=32).quantize(weight).dequantize().double()
    target = (full @ weight.double().T - quantized @ base.T).numpy()  # outputs left to explain
    solution, *_ = lstsq(quantized.numpy(), target)
    u, s, vh = svd(quantized.numpy() @ solution, full_matrices=False)
    fitted = (u[:, :3] * s[:3]) @ vh[:3]
    expected = ((target - fitted) ** 2).sum() / len(full)

    moments = PairedMoments(joint(full, quantized).second_moment)
    from quailora.metrics import Gram

    correction = Optimal().solve(weight + shift(moments, weight, 0.0) - base, Gram(moments.quantized.contiguous()), 3)
    assert output_error(moments, weight, base + correction.dense()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("noise", "tokens", "low", "high"), [(0.3, 4000, 0.5, 1.0), (0.0, 4000, 0.0, 1.0), (1.0, 8, 0.0, 0.5)]
)
def test_shrinkage_follows_the_evidence(noise, tokens, low, high):
    """Many tokens that differ: near `W*`. Few tokens: near `W`."""
    weight, full, quantized = problem(3, 2 * tokens, 12, 16, noise)
    seen, held_out = joint(full[:tokens], quantized[:tokens]), joint(full[tokens:], quantized[tokens:])
    layer, asymmetry = initialize_asymmetric(Initializer(NF4(), Optimal(), 3), weight, seen, held_out, trust=1.0)
    assert low <= asymmetry <= high
    assert layer.error_optimal <= layer.error * (1 + 1e-6)
    assert layer.error <= layer.error_uncalibrated * (1 + 1e-6) <= layer.error_none * (1 + 1e-5)


def test_it_beats_the_symmetric_problem_on_new_tokens():
    weight, full, quantized = problem(4, 12000, 12, 16, 0.5)
    parts = [joint(full[start : start + 4000], quantized[start : start + 4000]) for start in (0, 4000, 8000)]
    initializer = Initializer(NF4(block_size=32), Optimal(), 6)
    layer, _ = initialize_asymmetric(initializer, weight, *parts[:2])
    symmetric = initializer(weight, quantized_inputs(*parts[:2]))
    judge = PairedMoments(parts[2].second_moment)
    errors = [
        output_error(judge, weight, each.quantized.dequantize() + each.low_rank.dense()) for each in (layer, symmetric)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_other_metrics_are_refused():
    weight, full, quantized = problem(5)
    statistics = joint(full, quantized)
    with pytest.raises(
        ConfigurationError, match="Asymmetric inputs need the metric 'gram' or 'shrunk', got 'diagonal'"
    ):
        initialize_asymmetric(Initializer(NF4(), Optimal(), 3, "diagonal"), weight, statistics, statistics)
