"""Statistics of two networks' inputs against their definitions, and the laws that plain ones keep."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quailora import InputStatistics
from quailora.core.paired import PairedStatistics
from quailora.errors import NumericalError


def inputs(seed, tokens=50, columns=7):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, columns, generator=generator)
    return full, full + 0.01 * torch.randn(tokens, columns, generator=generator)


def assert_same(found, expected, scale=1.0):
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.gap, expected.gap, rtol=1e-5, atol=1e-7 * scale)
    for name in ("second_moment", "mean_magnitude", "mean"):
        one, other = getattr(found.quantized, name), getattr(expected.quantized, name)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_by_definition(dtype, monkeypatch):
    """Over several products; the small difference between the networks keeps its precision."""
    monkeypatch.setattr("quailora.core.paired.CHUNK_TOKENS", 16)
    full, quantized = (each.to(dtype) for each in inputs(0))
    found = PairedStatistics.from_inputs(full.reshape(5, 10, 7), quantized.reshape(5, 10, 7))
    left, right = full.double(), quantized.double()
    torch.testing.assert_close(found.gap, (left - right).T @ right / 50, rtol=1e-5, atol=1e-8)
    assert found.tokens == 50
    plain = InputStatistics.from_inputs(quantized)
    torch.testing.assert_close(found.quantized.second_moment, plain.second_moment)
    torch.testing.assert_close(found.quantized.mean_magnitude, plain.mean_magnitude)


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 50), max_size=4))
def test_merging_in_any_order_equals_accumulating_at_once(seed, cuts):
    """With parts that have no token among them; and a part can be left out again."""
    full, quantized = inputs(seed)
    bounds = sorted({0, 50, *cuts})
    parts = [PairedStatistics.from_inputs(full[a:b], quantized[a:b]) for a, b in pairwise(bounds)]
    whole = PairedStatistics.from_inputs(full, quantized)
    merged = PairedStatistics(7)
    for part in reversed(parts):
        merged = merged.merge(part)
    assert_same(merged, whole)
    if len(parts) > 1:
        rest = whole.quantized.without(parts[0].quantized)
        expected = InputStatistics.from_inputs(quantized[bounds[1] :])
        assert rest.tokens == expected.tokens
        torch.testing.assert_close(rest.second_moment, expected.second_moment, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest.mean_magnitude, expected.mean_magnitude, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest.mean, expected.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(30, 20), (50, 0), (0, 50)])
def test_pooling_is_merging_over_processes(counts):
    """Two processes in one: each adds what the other, which goes through the same calls, has at that point."""
    full, quantized = inputs(3)
    first = PairedStatistics.from_inputs(full[: counts[0]], quantized[: counts[0]])
    second = PairedStatistics.from_inputs(full[50 - counts[1] :], quantized[50 - counts[1] :])
    whole, total = first.merge(second), sum(counts)
    others = [
        torch.tensor(second.tokens),
        *(
            mean * second.tokens / max(1, total)
            for mean in (
                *(second.quantized._mean, second.quantized._magnitude, second.quantized._average),
                second.gap,
            )
        ),
    ]
    more = [second.quantized.samples.means, second.quantized.samples.firsts]
    first.pool(lambda tensor: tensor.add_(others.pop(0)), lambda tensor: [tensor, more.pop(0)])
    assert_same(first, whole)
    torch.testing.assert_close(first.quantized.samples.means, whole.quantized.samples.means)


def test_bad_inputs_are_refused():
    full, quantized = inputs(4)
    statistics = PairedStatistics(7)
    with pytest.raises(ValueError, match=r"equal shapes, got \(50, 7\) and \(49, 7\)"):
        statistics.update(full, quantized[1:])
    with pytest.raises(ValueError, match=r"inputs of width 7, got shape \(50, 6\)"):
        statistics.update(full[:, 1:], quantized[:, 1:])
    with pytest.raises(ValueError, match="statistics of width 7, got 6"):
        statistics.merge(PairedStatistics(6))
    full[3, 2] = torch.nan
    with pytest.raises(NumericalError, match="finite calibration inputs"):
        statistics.update(full, quantized)
    assert "in_features=7" in repr(statistics)
    few = InputStatistics.from_inputs(quantized)
    with pytest.raises(ValueError, match="fewer than 50 tokens to leave out, got 50"):
        few.without(few)
    assert PairedStatistics(3).to("cpu").tokens == 0
