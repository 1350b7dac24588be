"""The examples in the documents run."""

from __future__ import annotations

import re

import pytest
import torch
from examples import examples

from quailora.testing import check_quantizer, check_solver


def test_extending_example_is_a_conforming_quantizer():
    """The example quantizer is defined, and passes the checks that the page calls."""
    define, check = examples("docs/extending.md")[:2]
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(define, namespace)
    exec(check, namespace)
    assert namespace["Sign"]().quantize(torch.ones(4, 64)).bits_per_weight == pytest.approx(1 + 32 / 64)


def test_extending_example_for_solvers():
    from quailora import Optimal

    code = next(block for block in examples("docs/extending.md") if "check_solver" in block)
    exec(code, {"MySolver": Optimal})


def test_extending_example_for_schedules(monkeypatch):
    from quailora import NF4, InputStatistics
    from quailora.adapters.lora import LoraScaling
    from quailora.recipes import RECIPES

    code = next(block for block in examples("docs/extending.md") if "RECIPES" in block)
    monkeypatch.setattr("quailora.recipes.RECIPES", dict(RECIPES))
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(code, namespace)
    method = namespace["RECIPES"]["low-rank-first"].method(NF4(), LoraScaling(4))
    layer = method.initializer(torch.randn(16, 64), InputStatistics.from_inputs(torch.randn(200, 64)))
    assert layer.error < layer.error_none


def test_quickstart_layer_example():
    code = next(block for block in examples("docs/quickstart.md") if "AlternatingLeastSquares" in block)
    namespace = {"batches": [torch.randn(2, 100, 512)], "weight": torch.randn(64, 512)}
    exec(code, namespace)
    layer = namespace["layer"]
    assert layer.error < layer.error_uncalibrated


def test_readme_example_prints_what_it_says():
    code = next(block for block in examples("README.md") if "Initializer" in block)
    promised = re.findall(r"print\(.*\)\s+# (.*)", code)
    printed: list[str] = []
    exec(code, {"print": lambda *values: printed.append(" ".join(str(value) for value in values))})
    assert promised
    assert printed == promised


def test_training_example_for_peft(tiny_llama, tmp_path, monkeypatch):
    from quailora.pipeline import init

    init(str(tiny_llama), out=str(tmp_path / "adapter"), rank=4, samples=4, sequence_length=64)
    monkeypatch.chdir(tmp_path)
    namespace = {"MODEL": str(tiny_llama)}
    exec(examples("docs/training.md")[0], namespace)
    trainable = [name for name, each in namespace["model"].named_parameters() if each.requires_grad]
    assert len(trainable) == 2 * 14


def test_checks_are_importable_by_third_parties():
    assert callable(check_quantizer)
    assert callable(check_solver)
