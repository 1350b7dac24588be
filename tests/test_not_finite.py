"""Numbers that are not finite are never taken for an error of zero, and scales come down to the end of float16."""

from __future__ import annotations

import math

import pytest
import torch

from quailora import GPTQ, NF4, Diagonal, Initializer, InputStatistics, Int8, Optimal, Uniform, Zero
from quailora.core.metrics import Gram, Identity
from quailora.core.objective import Objective
from quailora.errors import NumericalError
from quailora.families.alternating import of_one_size
from quailora.quantizers.fourbit import Codebook, ScaledCodebook
from quailora.solvers import SVD


@pytest.mark.parametrize(
    "metric", [Gram(torch.eye(4).double()), Gram(torch.eye(4)), Identity(), Diagonal(torch.ones(4))]
)
def test_the_energy_of_nan_is_nan(metric):
    assert math.isnan(metric.energy(torch.full((3, 4), torch.nan)))
    assert metric.energy(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("solver", [Zero(), Optimal(), SVD()], ids=repr)
def test_a_weight_that_is_quantized_already_has_to_be_finite(solver, generator):
    weight = torch.randn(32, 64, generator=generator)
    statistics = InputStatistics(64)
    statistics.update(torch.randn(128, 64, generator=generator))
    quantized = NF4().quantize(weight)
    weight[3, 5] = torch.nan
    with pytest.raises(NumericalError, match="got 1 NaN or infinite entries"):
        Initializer(None, solver, 4)(weight, statistics, quantized=quantized)


def test_weights_beyond_float16_are_refused():
    weight = torch.randn(16, 64).bfloat16()
    weight[0, 0] = 1e5
    with pytest.raises(NumericalError, match=r"cannot hold a weight of magnitude 9\.98e"):
        Int8().quantize(weight)
    half = torch.full((8, 64), 1.0, dtype=torch.float16)
    half[:, 0] = 65504.0
    for quantizer in (Uniform(4, 64), GPTQ(4)):
        with pytest.raises(NumericalError, match="rounded beyond it"):
            Initializer(quantizer, Zero(), 4)(half, statistics_of(64))


def statistics_of(width):
    found = InputStatistics(width)
    found.update(torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0)))
    return found


def test_factors_of_a_product_of_zero_stay_as_they_are():
    parts = {"left": torch.zeros(4, 2), "right": torch.ones(2, 4)}
    assert all(torch.equal(part, parts[name]) for name, part in of_one_size(parts).items())


@pytest.mark.parametrize("size", [1e-7, 3e-8])
def test_small_weights_have_the_smallest_scale(size, generator):
    """Not that of a group of zeros, with which all of them would become zero."""
    weight = size * torch.randn(8, 64, generator=generator)
    error = (Uniform(4, 64).quantize(weight).dequantize() - weight).norm() / weight.norm()
    assert error < 0.6  # where nothing is left, it is 1
    assert torch.equal(Uniform(4, 64).quantize(torch.zeros(8, 64)).dequantize(), torch.zeros(8, 64))


def test_scales_below_zero_have_the_nearest_code(generator):
    """Those of NF4, which are quantized themselves, can come out so in blocks that are nearly zero."""
    book = Codebook.of(NF4().quantize(torch.randn(8, 64, generator=generator)).state.code)
    values = torch.randn(4, 64, generator=generator)
    for scale in (1.5, -1.5):
        scaled = ScaledCodebook(book, torch.full((4, 1), scale))
        levels = scaled.decode(torch.arange(16).float().expand(4, 16))
        nearest = (values[:, :, None] - levels[:, None]).abs().amin(-1)
        found = scaled.decode(scaled.encode(values))
        torch.testing.assert_close((values - found).abs(), nearest)


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_a_rough_optimum_is_never_worse_than_the_plain_decomposition(tolerance):
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(600, 600, generator=generator)
    inputs = torch.randn(4096, 600, generator=generator)
    objective = Objective(error, Gram(inputs.T @ inputs / len(inputs)))
    plain = SVD().minimise(objective, 16).error
    assert Optimal(tolerance=tolerance).minimise(objective, 16).error <= plain * (1 + 1e-6)
