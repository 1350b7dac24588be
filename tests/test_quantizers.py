"""Quantizers against independent oracles: bitsandbytes' own layers, a naive GPTQ, bit counts by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import QUANTIZERS, each_quantizer
from hypothesis import given
from hypothesis import strategies as st
from oracles import load_auto_gptq, run_auto_gptq
from strategies import problems

from quailora import (
    FP4,
    GPTQ,
    HQQ,
    NF4,
    NF4GPTQ,
    NF4MSE,
    AutoGPTQ,
    Gram,
    InputStatistics,
    Int8,
    Sign,
    SignGPTQ,
    TorchaoInt8,
    Uniform,
)
from quailora.errors import CalibrationError, ConfigurationError, NumericalError
from quailora.quantizers import auto_gptq, fourbit, gptq
from quailora.quantizers.grid import Grid
from quailora.quantizers.packing import pack, unpack
from quailora.testing import make_problem

CALIBRATED = [quantizer for quantizer, _ in QUANTIZERS if quantizer.needs_calibration]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bit_equals_bitsandbytes_layer(quant_type, double_quantization, dtype, generator):
    """The dequantized weight is exactly what a stock `Linear4bit` computes with."""
    import bitsandbytes as bnb

    weight = torch.randn(96, 128, generator=generator).to(dtype)
    parameter = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double_quantization
    ).to("cpu")
    expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    quantizer = {"nf4": NF4, "fp4": FP4}[quant_type](double_quantization=double_quantization)
    stored = quantizer.quantize(weight)
    assert isinstance(stored, fourbit.FourBitWeight)
    torch.testing.assert_close(stored.codes, parameter.data, rtol=0, atol=0)
    torch.testing.assert_close(stored.dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_equals_bitsandbytes_layer(dtype, generator):
    """Codes and scales are those of a stock `Linear8bitLt`."""
    import bitsandbytes as bnb

    weight = torch.randn(96, 128, generator=generator).to(dtype)
    parameter = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    quantized = Int8().quantize(weight)
    torch.testing.assert_close(quantized.codes, parameter.CB, rtol=0, atol=0)
    torch.testing.assert_close(quantized.absmax, parameter.SCB, rtol=0, atol=0)
    by_hand = quantized.codes.double() * quantized.absmax[:, None].double() / 127
    torch.testing.assert_close(quantized.dequantize().double(), by_hand, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_equals_its_own_layer(dtype, generator):
    torchao = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(128, 96, bias=False, dtype=dtype)
    weight = layer.weight.detach().clone()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    torch.testing.assert_close(TorchaoInt8().quantize(weight).dequantize(), layer.weight.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_equals_its_own_layer(bits, generator):
    hqq = pytest.importorskip("hqq.core.quantize")
    layer = torch.nn.Linear(128, 96, bias=False)
    weight = layer.weight.detach().clone()
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    theirs = hqq.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()
    found = HQQ(bits=bits).quantize(weight)
    torch.testing.assert_close(found.dequantize(), theirs, rtol=2e-3, atol=1e-3)  # its scales in float16 here
    assert found.bits_per_weight == bits + 32 / 64


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (NF4(double_quantization=False), 4 + 32 / 64),
        (NF4(), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (256 * 512)),
        (FP4(block_size=128, double_quantization=False), 4 + 32 / 128),
        (Int8(), 8 + 32 / 512),
        (Uniform(bits=3, group_size=64), 3 + (16 + 3) / 64),
        (Uniform(bits=3, group_size=64, symmetric=True), 3 + 16 / 64),
        (Uniform(bits=5, group_size=None), 5 + (16 + 5) / 512),
        (GPTQ(bits=2, group_size=128), 2 + (16 + 2) / 128),
        (GPTQ(bits=2, group_size=128, activation_order=True), 2 + (16 + 2) / 128 + 32 / 256),
        (GPTQ(bits=2, group_size=128, activation_order=True, static_groups=True), 2 + (16 + 2) / 128),
    ],
    ids=repr,
)
def test_bits_per_weight_counts_everything(quantizer, bits):
    """Codes, scales, zero points, second-level scales and group indices, for a layer of 256 x 512."""
    problem = make_problem(256, 512)
    assert quantizer.quantize(problem.weight, problem.statistics).bits_per_weight == pytest.approx(bits, abs=1e-12)


@given(bits=st.integers(1, 8), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 999))
def test_packing_is_lossless_and_tight(bits, shape, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == -(-codes.numel() * bits // 8)
    torch.testing.assert_close(unpack(packed, bits, shape), codes, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_rounds_to_the_nearest_level(bits, generator):
    """No other level of the group's grid is nearer, found by trying them all."""
    weight = torch.randn(8, 40, generator=generator)
    quantized = Uniform(bits=bits, group_size=16).quantize(weight)
    scale = quantized.scale.float().repeat_interleave(16, 1)[:, :40, None]
    zero_point = unpack(quantized.zero_point, bits, tuple(quantized.scale.shape)).float()
    levels = (torch.arange(2**bits) - zero_point.repeat_interleave(16, 1)[:, :40, None]) * scale
    nearest = (levels - weight[:, :, None]).abs().min(-1).values
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=1e-5, atol=1e-5)


def naive_gptq(weight, moment, damping, bits, group_size):
    """The method from its definition: after each column the inverse of the remaining Hessian is computed anew."""
    weight, moment = weight.double(), moment.clone()
    moment.diagonal().add_(damping)
    levels = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            grid = gptq.Grid.fit(weight[:, column : column + group_size].float(), bits, symmetric=False)
        inverse = torch.linalg.inv(moment[column:, column:])
        levels[:, column] = grid.decode(grid.encode(weight[:, column].float())).double()
        error = (weight[:, column] - levels[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return levels.float()


@pytest.mark.parametrize("group_size", [8, 24, 48])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_gptq_equals_its_definition(group_size, shrinkage):
    problem = make_problem(20, 48, "decaying")
    moment = problem.statistics.second_moment
    shrunk = (1 - shrinkage) * moment + shrinkage * moment.diagonal().diag()
    expected = naive_gptq(problem.weight, shrunk, 0.01 * moment.diagonal().median().item(), 3, group_size)
    quantizer = GPTQ(bits=3, group_size=group_size, shrinkage=shrinkage)
    quantized = quantizer.quantize(problem.weight, problem.statistics).dequantize()
    different = (quantized - expected).abs() > 1e-6
    assert different.float().mean() < 0.01  # ties that float32 breaks the other way, and what follows from them


def test_gptq_blocks_do_not_change_the_result(monkeypatch):
    """Lazy updates over blocks equal updates over all columns at once."""
    problem = make_problem(16, 256, "decaying")
    quantizer = GPTQ(bits=4, group_size=16, shrinkage=0.0)
    small_blocks = quantizer.quantize(problem.weight, problem.statistics).dequantize()
    working = problem.weight.T.contiguous()
    moment = problem.statistics.second_moment
    factor = gptq.inverse_factor(moment, 0.01 * moment.diagonal().median().item(), shrinkage=0.0)
    monkeypatch.setattr(gptq, "BLOCK", 256)
    grids = []

    def levels(column):
        if column % 16 == 0:
            grids.append(Grid.fit(working[column : column + 16].T, 4, False))
        return grids[-1]

    codes, loss = gptq.sweep(working, factor, levels, 16)
    grid = Grid(torch.stack([each.scale for each in grids], 1), torch.stack([each.zero_point for each in grids], 1), 4)
    one_block = grid.decode_groups(codes.T, 16)
    assert ((small_blocks - one_block).abs() > 1e-6).float().mean() < 0.01
    damped = Gram(moment).damped(0.01 * (moment.diagonal().median() / moment.diagonal().mean()).item())
    assert loss == pytest.approx(damped.energy(problem.weight - one_block), rel=1e-4)


@pytest.mark.parametrize("quantizer", CALIBRATED, ids=repr)
@given(problem=problems(dtypes=(torch.float32,)))
def test_gptq_is_never_worse_than_rounding_to_nearest(quantizer, problem):
    metric = Gram(problem.statistics.second_moment)
    swept = quantizer.quantize(problem.weight, problem.statistics).dequantize()
    nearest = without_feedback(quantizer).quantize(problem.weight).dequantize()
    assert metric.energy(problem.weight - swept) <= metric.energy(problem.weight - nearest)


def without_feedback(quantizer):
    if isinstance(quantizer, NF4GPTQ):
        return (NF4MSE if quantizer.mse else NF4)(quantizer.block_size, quantizer.double_quantization)
    if isinstance(quantizer, SignGPTQ):
        return Sign(quantizer.group_size)
    return Uniform(quantizer.bits, quantizer.group_size, quantizer.symmetric, quantizer.mse)


@pytest.mark.parametrize("group_size", [None, 7, 16])
def test_signs_have_the_scale_of_least_error_and_one_bit_each(group_size):
    """The scale by least squares on the signs, group by group; groups of 100 columns end in a short one."""
    weight = make_problem(5, 100).weight
    stored = Sign(group_size).quantize(weight)
    for columns in torch.arange(100).split(group_size or 100):
        part = weight[:, columns]
        scales = torch.stack([torch.linalg.lstsq(row.sign()[:, None], row[:, None]).solution[0] for row in part])
        torch.testing.assert_close(stored.dequantize()[:, columns], part.sign() * scales, rtol=1e-3, atol=0)
    assert stored.nbytes == 5 * (-(-100 // (group_size or 100))) * 2 + -(-5 * 100 // 8)


def test_signs_with_feedback_beat_plain_signs_on_correlated_inputs():
    problem = make_problem(64, 128, "decaying")
    metric = Gram(problem.statistics.second_moment)
    errors = [
        metric.energy(problem.weight - quantizer.quantize(problem.weight, problem.statistics).dequantize())
        for quantizer in (SignGPTQ(), Sign())
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_scale_that_does_not_fit_is_refused():
    with pytest.raises(NumericalError, match=r"scales that fit float16.*mean magnitude 1e\+05"):
        Sign().quantize(torch.full((2, 64), 1e5))


@pytest.mark.parametrize("shape", [(12, 128), (5, 100), (3, 7)])
@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_codes_and_scales_are_those_that_bitsandbytes_reads(shape, double_quantization):
    """Packed codes times scales, by hand and by bitsandbytes; blocks may cross rows, and the last byte be half full."""
    weight = make_problem(*shape).weight
    stored = NF4(double_quantization=double_quantization).quantize(weight)
    table, scales = stored.state.code, fourbit.scales_of(stored)
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0)).float()
    found = fourbit.with_codes(stored, codes).dequantize()
    torch.testing.assert_close(found, table[codes.long()] * scales)
    assert fourbit.with_codes(stored, codes).nbytes == stored.nbytes


@pytest.mark.parametrize("quantizer", [NF4(), FP4()])
def test_a_codebook_finds_the_nearest_of_all_values(quantizer, generator):
    values = quantizer.quantize(torch.randn(64, 64, generator=generator), None).state.code.sort(stable=True).values
    changes = (values[1:] + values[:-1]) / 2
    # The hardest numbers are those next to a change, and those next to the edge of a cell of the table.
    codebook = fourbit.Codebook.of(values)
    edges = torch.arange(len(codebook.below) + 1) * (2 / len(codebook.below)) - 1
    hard = torch.cat([changes, edges, values])
    hard = torch.cat([hard, *(hard.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))])
    others = torch.tensor([-torch.inf, -1e30, -1.5, 1.5, 1e30, torch.inf])
    scaled = torch.cat([hard, others, 3 * torch.rand(100_000, generator=generator) - 1.5])
    expected = (scaled[:, None] > changes).sum(1, dtype=torch.int32)
    torch.testing.assert_close(codebook.nearest(scaled), expected, rtol=0, atol=0)
    torch.testing.assert_close(codebook.nearest(torch.tensor([torch.nan])), torch.zeros(1, dtype=torch.int32))


def test_nf4_with_feedback_beats_rounding_to_nearest_on_correlated_inputs():
    problem = make_problem(64, 128, "decaying")
    metric = Gram(problem.statistics.second_moment)
    swept, nearest = (
        quantizer.quantize(problem.weight, problem.statistics).dequantize() for quantizer in (NF4GPTQ(), NF4())
    )
    assert metric.energy(problem.weight - swept) < 0.6 * metric.energy(problem.weight - nearest)


def test_gptq_halves_the_error_on_correlated_inputs():
    """An ordering with room: the method must do what it is for."""
    problem = make_problem(64, 128, "decaying")
    metric = Gram(problem.statistics.second_moment)
    swept = GPTQ(bits=3).quantize(problem.weight, problem.statistics).dequantize()
    nearest = Uniform(bits=3).quantize(problem.weight).dequantize()
    assert metric.energy(problem.weight - swept) < 0.5 * metric.energy(problem.weight - nearest)


def test_median_damping_does_not_see_a_massive_channel():
    """Damping relative to the mean is thousands of times larger there, and costs accuracy."""
    problem = make_problem(48, 64, "massive channel")
    metric = Gram(problem.statistics.second_moment)
    errors = {}
    for scale in ("mean", "median"):
        quantized = GPTQ(bits=4, damping_scale=scale, shrinkage=0.0).quantize(problem.weight, problem.statistics)
        errors[scale] = metric.energy(problem.weight - quantized.dequantize())
    assert errors["median"] <= errors["mean"]


def test_shrinkage_does_not_fit_what_few_tokens_say():
    """On other tokens of the same inputs, feedback that trusts all correlations of half as many as channels loses."""
    seen, other = make_problem(64, 128, "generic"), make_problem(64, 128, "generic", seed=1)
    metric = Gram(other.statistics.second_moment)
    few = InputStatistics.from_inputs(seen.inputs[:64])
    errors = {
        shrinkage: metric.energy(
            seen.weight - GPTQ(bits=3, shrinkage=shrinkage).quantize(seen.weight, few).dequantize()
        )
        for shrinkage in (0.0, 0.2)
    }
    assert errors[0.2] < 0.8 * errors[0.0]


@pytest.mark.parametrize("columns", [64, 96, 1, 130])
def test_blocks_of_four_bits_may_run_over_the_ends_of_rows(columns, generator):
    """The codes looked up in the table, times the scale of their block: in any shape, on any device."""
    stored = NF4(double_quantization=False).quantize(torch.randn(32, columns, generator=generator))
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], -1).flatten()[: 32 * columns].long()
    values = stored.state.code[codes] * stored.state.absmax.repeat_interleave(64)[: 32 * columns]
    torch.testing.assert_close(stored.dequantize(), values.view(32, columns))


@each_quantizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_and_counted(quantizer, bad):
    problem = make_problem(16, 32)
    problem.weight[3, 4] = bad
    with pytest.raises(NumericalError, match="got 1 NaN or infinite entries of 512"):
        quantizer.quantize(problem.weight, problem.statistics)


@each_quantizer
def test_zero_weights_stay_zero(quantizer):
    problem = make_problem(16, 32)
    quantized = quantizer.quantize(torch.zeros(16, 32), problem.statistics)
    torch.testing.assert_close(quantized.dequantize(), torch.zeros(16, 32))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="Expected 2 to 8 bits, got 9"):
        Uniform(bits=9)
    with pytest.raises(ValueError, match="group size of at least 1"):
        GPTQ(group_size=0)
    with pytest.raises(ValueError, match="damping of at least 0"):
        GPTQ(damping=-1.0)
    with pytest.raises(ValueError, match="Expected a shrinkage from 0 to below 1, got 1"):
        NF4GPTQ(shrinkage=1.0)
    with pytest.raises(ValueError, match=r"Expected a weight of shape .* got \(4,\)"):
        NF4().quantize(torch.zeros(4))
    with pytest.raises(CalibrationError, match="needs calibration"):
        GPTQ().quantize(torch.ones(4, 4))
    with pytest.raises(ValueError, match="Expected statistics of width 4, got 5"):
        Uniform().quantize(torch.ones(4, 4), InputStatistics(5))
    with pytest.raises(NumericalError, match="Expected scales that fit float16"):
        Uniform(bits=2).quantize(torch.full((2, 2), 1e9))


PUBLISHED = {"damping_scale": "mean", "shrinkage": 0.0}


@pytest.mark.parametrize("kind", ["generic", "decaying", "massive channel"])
@pytest.mark.parametrize(
    "quantizer",
    [
        GPTQ(bits=4, group_size=128, **PUBLISHED),
        GPTQ(bits=3, group_size=64, symmetric=True, **PUBLISHED),
        GPTQ(bits=4, group_size=None, symmetric=True, **PUBLISHED),
        GPTQ(bits=2, group_size=32, activation_order=True, **PUBLISHED),
        GPTQ(bits=4, group_size=32, activation_order=True, static_groups=True, **PUBLISHED),
    ],
    ids=repr,
)
def test_gptq_gives_the_codes_of_auto_gptq(quantizer, kind, monkeypatch):
    oracle = load_auto_gptq(double=True)
    if oracle is None:
        pytest.skip("the wheel of auto-gptq is not installed")
    problem = make_problem(96, 256, kind)
    moment = problem.statistics.second_moment
    expected = run_auto_gptq(oracle, problem.weight, moment, quantizer, monkeypatch)
    found = quantizer.quantize(problem.weight, problem.statistics).dequantize().double()
    same = (found - expected).abs() <= 1e-6 * expected.abs().max()
    assert same.double().mean() >= 0.999


@pytest.mark.parametrize("options", [{}, {"activation_order": True}, {"activation_order": True, "static_groups": True}])
def test_auto_gptq_backend_stores_what_its_class_finds(options, monkeypatch):
    """Dequantized from codes and float16 scales, it is the weight that the class leaves behind."""
    oracle = load_auto_gptq()
    if oracle is None:
        pytest.skip("the wheel of auto-gptq is not here")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    left = []

    class Watched(oracle):
        def fasterquant(self, **arguments):
            found = super().fasterquant(**arguments)
            left.append(self.layer.weight.data)
            return found

    monkeypatch.setattr(auto_gptq, "backend", lambda: Watched)
    problem = make_problem(64, 128, "decaying")
    stored = AutoGPTQ(bits=3, group_size=32, symmetric=False, **options).quantize(problem.weight, problem.statistics)
    torch.testing.assert_close(stored.dequantize(), left[0], rtol=1e-3, atol=1e-4)
    assert stored.packed().keys() == {"qweight", "qzeros", "scales", "g_idx"}


def test_auto_gptq_says_what_it_needs():
    problem = make_problem(16, 32)
    with pytest.raises(ConfigurationError, match="needs an environment of early 2024"):
        AutoGPTQ().quantize(problem.weight, problem.statistics)


@each_quantizer
@pytest.mark.parametrize("shape", [(8, 64), (3, 33)])
def test_codes_are_numbered_from_the_lowest_level_to_the_highest(quantizer, shape, generator):
    stored = quantizer.quantize(
        torch.randn(shape, generator=generator),
        InputStatistics.from_inputs(torch.randn(200, shape[1], generator=generator)),
    )
    if not stored.code_count:
        for ask in (
            stored.code_matrix,
            lambda: stored.decode(torch.ones(shape)),
            lambda: stored.recoded(torch.ones(shape)),
        ):
            with pytest.raises(ConfigurationError, match=r"The codes of .* stay as they are"):
                ask()
        return
    codes = stored.code_matrix()
    torch.testing.assert_close(stored.decode(codes), stored.dequantize(), rtol=0, atol=0)
    assert stored.recoded(codes).digest == stored.digest
    others = torch.randint(stored.code_count, shape, generator=generator)
    torch.testing.assert_close(stored.recoded(others).code_matrix().long(), others, rtol=0, atol=0)
    torch.testing.assert_close(stored.recoded(others).dequantize(), stored.decode(others), rtol=0, atol=0)
    above = stored.decode((others + 1).clamp(max=stored.code_count - 1))
    assert bool((above >= stored.decode(others)).all())
