"""The examples in the documents run."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
import types

import pytest
import torch
from families import save_llama
from helpers import init
from trainings import train
from transformers import AutoModelForCausalLM

from examples import ROOT, examples
from quailora import GPTQ, Optimal
from quailora.adapters.change import TrainedChange
from quailora.adapters.saved import SavedAdapter
from quailora.cli import main as cli
from quailora.cli.main import main
from quailora.merging.scales import ScaleTraining
from quailora.merging.training import MergeTraining
from quailora.methods.block_training import BlockTraining
from quailora.models.layers import linear_layers
from quailora.models.locate import demo_file, resolve


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


@pytest.mark.filterwarnings("ignore")
def test_the_commands_and_the_code_on_what_comes_after_training_run(tokenizer, tmp_path, monkeypatch):
    """On a small model, on few and short windows; a base of llama.cpp has its own test."""
    monkeypatch.chdir(tmp_path)
    model = save_llama(tmp_path / "model", tokenizer)
    options = {"samples": 4, "sequence_length": 32, "solver": Optimal()}
    init(str(model), out="adapter", rank=8, **options)
    init(str(model), out="other-base", rank=4, quantizer=GPTQ(group_size=32), save_base=True, **options)
    (tmp_path / "other-base" / "base").rename("QUANTIZED")
    for name, seed in (("trained", 1), ("other", 2)):
        train(tmp_path / "adapter", tmp_path / name, by=0.2, seed=seed)
    words = ["river", "stone", "light", "under", "water", "green", "field", "small", "house"]
    texts = [" ".join(words[(index + step) % 9] for step in range(40)) for index in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "other.txt").write_text(" ".join(reversed(texts)))
    few = {
        "merge": [
            "--samples",
            "4",
            "--sequence-length",
            "32",
            "--windows",
            "2",
            "--window-length",
            "32",
            "--block-steps",
            "2",
            "--scale-steps",
            "2",
        ],
        "rebase": ["--samples", "4", "--sequence-length", "32"],
        "convert": [],
    }
    ran = [each for each in commands("docs/after.md") if not any(word.endswith(".gguf") for word in each)]
    assert {each[1] for each in ran} == few.keys()
    for each in ran:
        narrow = ["--into.group-size", "32"] if "--into.bits" in each else []  # the layers are 64 wide
        narrow += ["--quantizer.group-size", "32"] if "--quantizer.bits" in each else []
        assert main([*each[1:], *few[each[1]], *narrow, "--overwrite"]) == 0, each
    (tmp_path / "python").mkdir()
    for name in ("adapter", "trained", "other"):
        shutil.copytree(tmp_path / name, tmp_path / "python" / name)
    monkeypatch.chdir(tmp_path / "python")
    namespace = {"batches": [{"input_ids": torch.randint(100, (2, 32))} for _ in range(4)]}
    namespace["training"] = MergeTraining(BlockTraining(2, 64, 4, 32), ScaleTraining(2, 64, 32))
    for code in examples("docs/after.md"):
        narrow = code.replace("GPTQ(bits=3)", "GPTQ(bits=3, group_size=32)")
        exec(narrow.replace("max_kl=0.1", "max_kl=0.1, training=training"), namespace)
    assert namespace["merged"].certificate.divergence <= 0.1
    assert (namespace["moved"].folder / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_moved_to_a_base_of_llama_cpp(tmp_path, monkeypatch):
    """The demo model is such a file, and the base is what is in it: without any error, so that the change is all."""
    monkeypatch.chdir(tmp_path)
    small = {"samples": 4, "sequence_length": 64, "solver": Optimal()}
    init("demo", out="adapter", rank=4, **small)
    train(tmp_path / "adapter", tmp_path / "trained", AutoModelForCausalLM.from_pretrained(resolve("demo")), by=0.2)
    (line,) = (each for each in commands("docs/after.md") if any(word.endswith(".gguf") for word in each))
    (tmp_path / "model.gguf").symlink_to(demo_file())
    # Of text, and not of one sentence again and again, which says nothing of most directions of the inputs.
    text = (ROOT / "quailora" / "data" / "calibrate.txt").read_text(encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in text.split("\n\n")))
    assert main([*line[1:], "--rank", "8", "--samples", "8", "--sequence-length", "256"]) == 0
    change, moved = TrainedChange.read("trained"), SavedAdapter.read(tmp_path / "moved")
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(resolve("demo")))
    for name, layer in list(layers.items())[:7]:
        factors = [moved.tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "BA"]
        expected = change.of(layer, layers)
        assert (factors[0] @ factors[1] - expected).norm() < 1e-3 * expected.norm(), name
