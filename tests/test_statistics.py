"""Input statistics: precision over many tokens, files, bad input."""

from __future__ import annotations

import pytest
import torch

from quailora import InputStatistics
from quailora.core.linalg import safe_cholesky, self_product, triangular_inverse
from quailora.core.metrics import gram
from quailora.core.weightings import FirstTokenWeighting, TokenMeansWeighting
from quailora.errors import CalibrationError, NumericalError, NumericalWarning


def test_nothing_is_lost_over_a_million_tokens(generator):
    """A million bfloat16 tokens in 256 batches: the mean is right to float32 rounding of one product."""
    batch = torch.randn(4096, 16, generator=generator).to(torch.bfloat16)
    statistics = InputStatistics(16)
    for _ in range(256):
        statistics.update(batch)
    exact = batch.double().T @ batch.double() / len(batch)
    assert statistics.tokens == 256 * 4096
    torch.testing.assert_close(statistics.second_moment, exact, rtol=1e-6, atol=1e-7)


def test_float64_inputs_keep_float64(generator):
    inputs = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    expected = inputs.T @ inputs / 500
    torch.testing.assert_close(InputStatistics.from_inputs(inputs).second_moment, expected, rtol=1e-14, atol=1e-14)


def test_batches_of_any_shape(generator):
    inputs = torch.randn(2, 3, 5, 8, generator=generator)
    statistics = InputStatistics.from_inputs(inputs)
    assert statistics.tokens == 30
    assert repr(statistics) == "InputStatistics(in_features=8, tokens=30)"
    flat = InputStatistics.from_inputs(inputs.view(-1, 8))
    torch.testing.assert_close(statistics.second_moment, flat.second_moment)


def test_save_and_load(tmp_path, generator):
    statistics = InputStatistics.from_inputs(torch.randn(50, 8, generator=generator))
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = InputStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.tokens == 50
    torch.testing.assert_close(loaded.second_moment, statistics.second_moment, rtol=0, atol=0)
    torch.testing.assert_close(loaded.mean_magnitude, statistics.mean_magnitude, rtol=0, atol=0)
    torch.testing.assert_close(loaded.mean, statistics.mean, rtol=0, atol=0)


def test_samples(tmp_path, generator):
    """A sample is a row of a batch; padding does not count, and the first 128 samples are kept."""
    inputs = torch.randn(5, 6, 8, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1, 2])[:, None]
    padded = inputs.masked_fill(~mask[..., None], torch.nan)
    expected = torch.stack([inputs[row][mask[row]].mean(0) for row in (0, 1, 3, 4)])
    statistics = InputStatistics.from_inputs(padded, mask)
    torch.testing.assert_close(statistics.samples.means, expected)
    shifted = InputStatistics.from_inputs(padded.flip(1), mask.flip(1)).samples.firsts
    torch.testing.assert_close(shifted, torch.stack([inputs[0, 5], inputs[1, 2], inputs[3, 0], inputs[4, 1]]))
    torch.testing.assert_close(InputStatistics.from_inputs(inputs[0]).samples.means, inputs[0].mean(0, keepdim=True))
    many = InputStatistics.from_inputs(torch.randn(100, 2, 8, generator=generator))
    merged = statistics.merge(many).merge(many)
    torch.testing.assert_close(merged.samples.means[:4], expected)
    assert merged.samples.means.shape == (128, 8)
    merged.save(tmp_path / "statistics.safetensors")
    loaded = InputStatistics.load(tmp_path / "statistics.safetensors")
    torch.testing.assert_close(loaded.samples.means, merged.samples.means, rtol=0, atol=0)
    torch.testing.assert_close(loaded.samples.firsts, merged.samples.firsts, rtol=0, atol=0)
    assert not len(merged.without(statistics).samples)


def test_sums_have_no_samples():
    statistics = InputStatistics(4)
    statistics.add(torch.eye(4) * 9, 9)
    for weighting in (TokenMeansWeighting(), FirstTokenWeighting()):
        with pytest.raises(CalibrationError, match=f"{weighting.name} needs single samples.*Collect them again"):
            weighting.metric(statistics)


def test_the_first_token_counts_for_its_share(generator):
    inputs = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    statistics = InputStatistics.from_inputs(inputs)
    first = inputs[:, 0].T @ inputs[:, 0] / 3
    expected = 0.8 * statistics.second_moment + 0.2 * first
    found = FirstTokenWeighting(0.2).metric(statistics).second_moment
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_mean_is_unknown_where_a_part_is(tmp_path, generator):
    """Tokens of which only a Gram is known, and files of earlier versions, have no mean; nothing makes one up."""
    inputs = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    known = InputStatistics.from_inputs(inputs)
    torch.testing.assert_close(known.mean, inputs.mean(0))
    without = InputStatistics(8)
    without.add(inputs.T @ inputs, 50)
    assert without.mean is None
    assert known.merge(without).mean is None
    assert without.merge(known).mean is None
    without.save(tmp_path / "statistics.safetensors")
    assert InputStatistics.load(tmp_path / "statistics.safetensors").mean is None
    torch.testing.assert_close(known.merge(InputStatistics(8)).mean, inputs.mean(0))


def test_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CalibrationError, match=r"Expected the tensors mean_magnitude, .* got \['weight'\]"):
        InputStatistics.load(tmp_path / "other.safetensors")


def test_bad_input_is_refused():
    statistics = InputStatistics(4)
    with pytest.raises(CalibrationError, match="at least one calibration token"):
        _ = statistics.second_moment
    with pytest.raises(ValueError, match="Expected inputs of width 4"):
        statistics.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="Expected statistics of width 4, got 5"):
        statistics.merge(InputStatistics(5))
    bad = torch.zeros(3, 4)
    bad[1, 2] = torch.inf
    with pytest.raises(NumericalError, match="Expected finite calibration inputs"):
        statistics.update(bad)
    assert statistics.tokens == 0


def test_safe_cholesky_repairs_rounding_and_says_so(generator):
    thin = torch.randn(20, 3, generator=generator)
    indefinite = (thin @ thin.T).double()
    indefinite -= 1e-9 * torch.eye(20, dtype=torch.float64)
    with pytest.warns(NumericalWarning, match="indefinite by rounding; added"):
        factor = safe_cholesky(indefinite, max_tries=10)
    torch.testing.assert_close(factor @ factor.T, indefinite, rtol=1e-5, atol=1e-6)


def test_safe_cholesky_repairs_sums_that_were_rounded_to_float32(generator):
    """One massive direction, fewer tokens than channels: the smallest eigenvalues drown in its rounding errors."""
    inputs = torch.randn(64, 128, generator=generator)
    inputs += 1000 * torch.randn(64, 1, generator=generator) * torch.randn(128, generator=generator)
    summed = (inputs.T @ inputs).double() / 64
    assert torch.linalg.eigvalsh(summed)[0] < -1e-3
    with pytest.warns(NumericalWarning, match="indefinite by rounding"):
        safe_cholesky(summed)


def test_safe_cholesky_gives_up_on_a_negative_matrix():
    with pytest.raises(NumericalError, match="failed even after adding"):
        safe_cholesky(-torch.eye(3))


def test_triangular_inverse_over_several_blocks(generator):
    lower = torch.randn(70, 70, generator=generator, dtype=torch.float64).tril() + 10 * torch.eye(70)
    inverse = triangular_inverse(lower, block=16)
    torch.testing.assert_close(inverse @ lower, torch.eye(70, dtype=torch.float64))
    torch.testing.assert_close(inverse, inverse.tril(), rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 100, 192, 193, 500, 900])
def test_self_product_is_the_product_and_exactly_symmetric(columns, generator):
    matrix = torch.randn(60, columns, generator=generator)
    product = self_product(matrix)
    torch.testing.assert_close(product, matrix.T @ matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product, product.T, rtol=0, atol=0)


def test_what_depends_on_the_inputs_is_computed_once(generator):
    """Until more inputs come, or it is freed."""
    statistics = InputStatistics.from_inputs(torch.randn(50, 8, generator=generator))
    calls = []

    def compute():
        calls.append(1)
        return len(calls)

    assert [statistics.cached("key", compute), statistics.cached("key", compute)] == [1, 1]
    assert statistics.cached(("key", 0.1), compute) == 2
    statistics.clear_cache()
    assert statistics.cached("key", compute) == 3
    statistics.update(torch.ones(1, 8))
    assert statistics.cached("key", compute) == 4


def test_the_second_moment_is_not_copied(generator):
    statistics = InputStatistics.from_inputs(torch.randn(50, 8, generator=generator))
    assert statistics.second_moment is statistics.second_moment
    assert gram(statistics) is gram(statistics)


def test_sums_of_products_from_elsewhere(generator):
    inputs = torch.randn(50, 8, generator=generator)
    statistics = InputStatistics(8)
    statistics.add(inputs[:20].T @ inputs[:20], 20)
    statistics.add(inputs[20:].T @ inputs[20:], 30)
    statistics.add(torch.zeros(8, 8), 0)
    assert statistics.tokens == 50
    torch.testing.assert_close(statistics.second_moment, InputStatistics.from_inputs(inputs).second_moment)


def test_mean_magnitude(generator):
    """By definition, through batches, masks and merging; that of normal inputs where only products are known."""
    inputs = torch.randn(400, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7)
    statistics = InputStatistics(6)
    statistics.update(inputs[:100])
    mask = torch.arange(300) < 200
    statistics.update(inputs[100:], mask)
    expected = inputs[:300].abs().mean(0)
    torch.testing.assert_close(statistics.mean_magnitude, expected)
    merged = statistics.merge(InputStatistics.from_inputs(inputs[300:]))
    torch.testing.assert_close(merged.mean_magnitude, inputs.abs().mean(0))
    known = InputStatistics(6)
    known.add(inputs.T @ inputs, 400)
    torch.testing.assert_close(known.mean_magnitude, inputs.abs().mean(0), rtol=0.1, atol=0)
