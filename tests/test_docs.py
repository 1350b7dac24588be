"""The examples in the documents run."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
import types

import pytest
import torch

from examples import ROOT, examples
from quailora.cli import main as cli
from quailora.cli.main import main


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
    from quailora.methods.recipes import RECIPES

    code = next(block for block in examples("docs/extending.md") if "RECIPES" in block)
    monkeypatch.setattr("quailora.methods.recipes.RECIPES", dict(RECIPES))
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(code, namespace)
    exec(next(block for block in examples("docs/extending.md") if "check_schedule" in block), namespace)
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
    from helpers import init

    init(str(tiny_llama), out=str(tmp_path / "adapter"), rank=4, samples=4, sequence_length=64)
    monkeypatch.chdir(tmp_path)
    namespace = {"MODEL": str(tiny_llama)}
    exec(next(block for block in examples("docs/training.md") if "PeftModel.from_pretrained(" in block), namespace)
    trainable = [name for name, each in namespace["model"].named_parameters() if each.requires_grad]
    assert len(trainable) == 2 * 14


def test_readme_example_initializes_a_model_in_memory(tiny_llama):
    code = next(block for block in examples("README.md") if "quailora.initialize(" in block)
    code = code.replace('"HuggingFaceTB/SmolLM2-135M"', repr(str(tiny_llama)))
    code = code.replace("Calibration()", "Calibration(samples=4, sequence_length=32)")
    namespace: dict[str, object] = {}
    exec(code, namespace)
    layers = [module for module in namespace["model"].modules() if "default" in getattr(module, "lora_B", {})]
    assert len(layers) == len(namespace["report"]["layers"]) > 0
    assert all(module.lora_B["default"].weight.any() for module in layers)


def test_readme_example_loads_an_adapter(tiny_llama, tmp_path, monkeypatch):
    from helpers import init

    init(str(tiny_llama), out=str(tmp_path / "adapter"), rank=4, samples=4, sequence_length=64)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    code = next(block for block in examples("README.md") if "PeftModel" in block)
    exec(code.replace('"MODEL"', repr(str(tiny_llama))), namespace)
    assert namespace["model"].peft_config["default"].r == 4


def test_the_configuration_of_the_quick_start_runs(tiny_llama, tmp_path):
    (tmp_path / "run.yaml").write_text(examples("docs/quickstart.md", "yaml")[0], encoding="utf-8")
    small = ["--samples", "4", "--sequence-length", "32", "--rank", "4"]
    assert (
        main(["init", str(tiny_llama), "--out", str(tmp_path / "a"), "--config", str(tmp_path / "run.yaml"), *small])
        == 0
    )
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["quantizer"]["init_args"] | {"bits": 3, "group_size": 64} == sidecar["quantizer"]["init_args"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page, monkeypatch, tmp_path):
    """Each is parsed by the command line, with a function of the same signature in place of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("rank: 4", encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.yaml").write_text("rank: 4", encoding="utf-8")
    write_package(monkeypatch)
    for name, function in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, stub(function))
    for words in commands(page):
        assert main(words[1:]) == 0, words


def commands(page):
    """Return the words of every command of ours on a page, but those that only ask for help."""
    lines = [line for block in examples(page, "console") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line.removeprefix("$ ").partition("  #")[0]) for line in lines]
    return [each for each in words if each[:1] == ["quailora"] and not any(word.endswith(".help") for word in each)]


def test_the_pages_show_every_command():
    shown = {words[1] for page in PAGES for words in commands(page)}
    assert shown | {"demo"} == cli.COMMANDS.keys()  # which `make demo` runs


def write_package(monkeypatch):
    """Make the package that a reader of docs/extending.md has written, with the names that the page uses."""
    from quailora import Optimal
    from quailora.methods.recipes import RECIPES, Recipe

    monkeypatch.setattr("quailora.methods.recipes.RECIPES", dict(RECIPES))  # commands add the recipe of the page
    code = examples("docs/extending.md")[0].replace(
        "class Sign(Quantizer):", 'class Sign(Quantizer):\n    name = "sign"'
    )
    package = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", package)
    exec(code, package.__dict__)
    package.LOW_RANK_FIRST = Recipe("me, 2026", Optimal())


def stub(function):
    """Return a function with the signature and the text of another one that does nothing."""

    @functools.wraps(function)
    def nothing(*_, **__):
        return types.SimpleNamespace(show=lambda: None)

    return nothing
