"""The asymmetric problem against plain least squares and against the data it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lstsq, svd

from quailora import GPTQ, NF4, Gram, Initializer, Optimal, Uniform
from quailora.core.paired import PairedStatistics
from quailora.core.weightings import DiagonalWeighting
from quailora.errors import CalibrationError, ConfigurationError
from quailora.layer import asymmetric as module
from quailora.layer.asymmetric import RIDGES, STEP, HeldOutFit, initialize_asymmetric, shift
from quailora.schedules import HeldOut, Once
from quailora.testing import INPUT_KINDS, make_problem, optimal_error, rounding


def problem(seed, tokens=400, rows=12, columns=16, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    quantized = full + noise * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, full, quantized


def output_error(full, quantized, weight, other):
    """`E |W x - V x~|^2` from the data: squared, total over outputs, per token."""
    return (full @ weight.double().T - quantized @ other.double().T).square().sum().item() / len(full)


paired = PairedStatistics.from_inputs


def both(full, quantized, seen):
    """Statistics of all tokens, and of those after the first ones."""
    return paired(full, quantized), paired(full[seen:], quantized[seen:])


def test_target_without_ridge_is_that_of_least_squares():
    weight, full, quantized = problem(0)
    found = weight + shift(weight, paired(full, quantized), 0.0)
    expected, *_ = lstsq(quantized.numpy(), (full @ weight.double().T).numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected).T)


def test_a_large_ridge_is_the_weight_and_equal_inputs_ask_for_nothing():
    weight, full, quantized = problem(1)
    statistics = paired(full, quantized)
    before = statistics.quantized.second_moment.clone()
    far = shift(weight, statistics, 1e6)
    torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-4)
    torch.testing.assert_close(statistics.quantized.second_moment, before, rtol=0, atol=0)  # its ridge is gone
    for ridge in RIDGES:
        nothing = shift(weight, paired(full, full), ridge)
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=0)


@given(seed=st.integers(0, 2**16), loud=st.sampled_from([1.0, 3000.0]))
def test_the_shrinkage_chosen_is_the_best_of_many(seed, loud):
    """By the outputs on the tokens that were held out, one channel as loud as in language models or not."""
    weight, full, quantized = problem(seed, 60, 4, 6)
    full[:, 2] *= loud
    quantized[:, 2] *= loud
    every, held = both(full, quantized, 30)
    ridge, share = HeldOutFit.of(weight, every, held).choose()
    fitted = paired(full[:30], quantized[:30])
    judge = full[30:], quantized[30:], weight
    least = min(
        output_error(*judge, weight + step / 20 * shift(weight, fitted, each)) for each in RIDGES for step in range(21)
    )
    assert output_error(*judge, weight + share * shift(weight, fitted, ridge)) <= least * (1 + 1e-5)


@pytest.mark.parametrize("loud", [1.0, 3000.0])
def test_the_fit_in_float32_is_that_in_float64(loud):
    """Channel by channel, however loud one of them is, and the errors on held-out tokens likewise."""
    weight, full, quantized = problem(7, 900, 12, 300)
    mixing = torch.randn(300, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 300**0.5
    scale = torch.arange(1, 301) ** -0.5
    scale[0] = loud
    full, quantized = full @ mixing * scale, quantized @ mixing * scale
    every, held = both(full, quantized, 600)
    fit, fitted = HeldOutFit.of(weight, every, held), paired(full[:600], quantized[:600])
    judge = full[600:], quantized[600:], weight
    for ridge in RIDGES:
        expected = shift(weight, fitted, ridge)
        torch.testing.assert_close(fit.shift(ridge).double(), expected, rtol=1e-3, atol=1e-4 * expected.std().item())
        other = weight + expected.float()
        away = output_error(*judge, other) - output_error(*judge, weight)
        assert fit.error(other) == pytest.approx(away, rel=1e-4)


def test_reduced_rank_regression_against_scipy():
    """With the target `W*` and the metric `H~` the fast solver finds the best correction of the outputs themselves."""
    weight, full, quantized = problem(2)
    base = NF4(block_size=32).quantize(weight).dequantize().double()
    target = (full @ weight.double().T - quantized @ base.T).numpy()  # outputs left to explain
    solution, *_ = lstsq(quantized.numpy(), target)
    u, s, vh = svd(quantized.numpy() @ solution, full_matrices=False)
    fitted = (u[:, :3] * s[:3]) @ vh[:3]
    expected = ((target - fitted) ** 2).sum() / len(full)

    statistics = paired(full, quantized)
    error = weight + shift(weight, statistics, 0.0) - base
    correction = Optimal().solve(error, Gram(statistics.quantized.second_moment), 3)
    assert output_error(full, quantized, weight, base + correction.dense()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("noise", "tokens", "low", "high"), [(0.3, 4000, 0.5, 1.0), (0.0, 4000, 0.0, 0.0), (1.0, 8, 0.0, 0.5)]
)
def test_shrinkage_follows_the_evidence(noise, tokens, low, high):
    """Many tokens that differ: near `W*`. Few tokens, or none that differ: near `W`."""
    weight, full, quantized = problem(3, 2 * tokens, 12, 16, noise)
    pair = both(full, quantized, tokens)
    initializer = Initializer(NF4(), Optimal(), 3)
    layer, asymmetry = initialize_asymmetric(initializer, weight, *pair, step=1.0)
    assert low <= asymmetry <= high
    assert layer.error_optimal <= layer.error * (1 + 1e-6)
    assert layer.error <= layer.error_uncalibrated * (1 + 1e-6) <= layer.error_none * (1 + 1e-5)


@pytest.mark.parametrize("tokens", [8, 4000])
def test_equal_inputs_give_the_symmetric_solution(tokens):
    weight, full, quantized = problem(3, 2 * tokens, noise=0.0)
    pair = both(full, quantized, tokens)
    initializer = Initializer(NF4(), Optimal(), 3)
    layer, asymmetry = initialize_asymmetric(initializer, weight, *pair, step=1.0)
    symmetric = initializer(weight, pair[0].quantized)
    assert asymmetry == 0
    assert layer.low_rank.dense().norm() > 0
    torch.testing.assert_close(layer.low_rank.dense(), symmetric.low_rank.dense())
    assert layer.error == pytest.approx(symmetric.error)


def test_it_beats_the_symmetric_problem_on_new_tokens():
    weight, full, quantized = problem(4, 12000, 12, 16, 0.5)
    pair = both(full[:8000], quantized[:8000], 4000)
    initializer = Initializer(NF4(block_size=32), Optimal(), 6)
    layer, _ = initialize_asymmetric(initializer, weight, *pair)
    symmetric = initializer(weight, pair[0].quantized)
    errors = [
        output_error(full[8000:], quantized[8000:], weight, each.quantized.dequantize() + each.low_rank.dense())
        for each in (layer, symmetric)
    ]
    assert errors[0] < 0.9 * errors[1]


DEGENERATE = {
    "no inputs": lambda full, quantized: (0 * full, 0 * quantized),
    "dead channels": lambda full, quantized: (full * (torch.arange(16) % 4 == 0), quantized * (torch.arange(16) < 4)),
    "few tokens": lambda full, quantized: (full[[0, 1, 399]], quantized[[0, 1, 399]]),
    "one direction": lambda full, quantized: (full[:, :1] * torch.ones(16), quantized[:, :1] * torch.ones(16)),
    "two massive channels alike": lambda full, quantized: (
        full + 3000 * full[:, :1] * (torch.arange(16) < 2),
        quantized + 3000 * full[:, :1] * (torch.arange(16) < 2),
    ),
    "tiny": lambda full, quantized: (1e-20 * full, 1e-20 * quantized),
    "nothing alike": lambda full, quantized: (full, quantized.flip(0)),
}


@pytest.mark.parametrize("schedule", [Once(), HeldOut(Once(), (0.1,))], ids=repr)
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.filterwarnings("ignore:A Gram matrix was indefinite by rounding")
def test_degenerate_inputs(kind, schedule):
    weight, full, quantized = problem(6)
    full, quantized = DEGENERATE[kind](full, quantized)
    pair = both(full, quantized, len(full) * 3 // 4)
    initializer = Initializer(Uniform(3, 16), Optimal(), 3, schedule=schedule)
    layer, asymmetry = initialize_asymmetric(initializer, weight, *pair)
    assert 0 <= asymmetry <= 0.5
    assert layer.low_rank.lora_A.isfinite().all()
    assert layer.low_rank.lora_B.isfinite().all()
    floor = 1e-6 * layer.error_none
    assert layer.error_optimal <= layer.error + floor
    assert layer.error <= layer.error_uncalibrated + floor
    assert layer.error_uncalibrated <= layer.error_none + floor


@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore:A Gram matrix was indefinite by rounding")
@pytest.mark.parametrize("kind", INPUT_KINDS)
@given(seed=st.integers(0, 2**16), noise=st.sampled_from([0.0, 0.3, 3.0]), rank=st.integers(1, 12))
def test_laws_hold_for_inputs_of_every_kind(kind, seed, noise, rank):
    """Against float64 and SciPy, where dead channels, missing directions and massive channels stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    case = make_problem(12, 16, kind, seed=seed)
    weight, full = case.weight, case.inputs.repeat(4, 1)  # a single token would leave none to hold out
    changes = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(len(full), 1), (1, 16)])
    quantized = full * (1 + noise * next(changes)) * (1 + noise * next(changes))
    seen = len(full) * 3 // 4
    every, held = both(full, quantized, seen)
    base = Uniform(3, 16)
    layer, asymmetry = initialize_asymmetric(Initializer(base, Optimal(), rank), weight, every, held)
    assert 0 <= asymmetry <= STEP

    fit = HeldOutFit.of(weight, every, held)
    ridge, share = fit.choose()
    judge = full[seen:], quantized[seen:], weight
    before = output_error(*judge, weight)
    after = output_error(*judge, weight + asymmetry * fit.shift(ridge))
    assert asymmetry == STEP * share
    assert after <= before + 1e-6 * output_error(*judge, torch.zeros_like(weight))

    moment = every.quantized.second_moment
    stored = base.quantize(weight).dequantize()
    torch.testing.assert_close(layer.quantized.dequantize(), stored, rtol=0, atol=0)
    error = (weight.double() + asymmetry * shift(weight, every, ridge) - stored).float().double()
    correction = layer.low_rank.dense().double()
    slack = 2 * rounding(layer.error_uncalibrated, layer.error_none, torch.float32) + 1e-6 * layer.error
    assert layer.error_none == pytest.approx((error @ moment * error).sum().item(), rel=1e-5)
    rest = error - correction
    assert layer.error == pytest.approx((rest @ moment * rest).sum().item(), abs=slack)
    assert layer.error == pytest.approx(optimal_error(error, moment, rank), abs=slack)
    assert layer.error_optimal <= layer.error + slack
    assert layer.error <= layer.error_uncalibrated + slack
    assert layer.error_uncalibrated <= layer.error_none + slack


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the float64 numbers of all storages that operations have made and that are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage)
        live = {key: one for key, one in self.storages.items() if not one[0].expired()}
        self.storages = live
        self.peak = max(self.peak, sum(size for _, size in live.values()) / 8)
        return made


@pytest.mark.parametrize(
    ("quantizer", "schedule", "most"), [(NF4(), Once(), 5), (Uniform(3), HeldOut(Once(), ()), 5), (GPTQ(), Once(), 6)]
)
def test_an_input_takes_five_moments(quantizer, schedule, most, monkeypatch):
    """Statistics and fit together, in float64, at any time; error feedback factors one more."""
    width = 320
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr("quailora.core.linalg._ROWS", 8)
    monkeypatch.setattr("quailora.core.metrics._EXACT_WIDTH", 0)
    _, full, quantized = problem(8, 480, 2, width)
    full, quantized, weight = full.float(), quantized.float(), torch.randn(2, width)
    initializer = Initializer(quantizer, Optimal(), 1, schedule=schedule)
    with Counted() as counted:
        every, held = PairedStatistics(width), PairedStatistics(width)
        every.update(full[:360], quantized[:360])
        held.update(full[360:], quantized[360:])
        every.include(held)
        assert counted.peak <= 4 * width**2 + 100 * width
        layer, _ = initialize_asymmetric(initializer, weight, every, held)
        assert layer.error > 0
    assert counted.peak <= most * width**2 + 100 * width


def test_what_cannot_be_fitted_is_refused():
    weight, full, quantized = problem(5)
    every, held = both(full, quantized, 300)
    with pytest.raises(ConfigurationError, match=r"keeps correlations of the inputs, got DiagonalWeighting\(\)"):
        initialize_asymmetric(Initializer(NF4(), Optimal(), 3, DiagonalWeighting()), weight, every, held)
    initializer = Initializer(NF4(), Optimal(), 3)
    for part in (every, PairedStatistics(16)):
        with pytest.raises(CalibrationError, match=r"some of 400 tokens to be held out, got (400|0)\."):
            initialize_asymmetric(initializer, weight, every, part)
