"""A package of somebody else, from the laws to the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from third_party import TAKEN_OFF, Careful, Inputwise, Loudness, Signs, TakenOff

from quailora.methods.recipes import RECIPES
from quailora.testing import check_family, check_quantizer, check_schedule, check_solver

PLUGIN = ["--plugin", "third_party"]
FAST = ["--samples", "4", "--sequence-length", "64", "--rank", "4"]
SHORT = ["--windows", "1", "--sequence-length", "64"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Recipes that a test makes known are forgotten after it."""
    known = dict(RECIPES)
    yield
    RECIPES.clear()
    RECIPES.update(known)


def test_its_parts_keep_the_laws():
    check_quantizer(Signs())
    check_quantizer(Signs(groups=3))
    check_solver(Careful())
    check_solver(Careful(), weighting=Loudness())
    check_schedule(TakenOff(), never_worse=True)
    check_schedule(TakenOff(), quantizer=Signs(), solver=Careful())
    check_family(Inputwise())
    check_family(Inputwise(skip=1))


def test_a_family_from_init_to_compare(run, tiny_llama, tmp_path):
    """A kind of adapter of a package: its fields on the command line, its files in stock PEFT, its rows beside LoRA."""
    words = ["--family", "inputwise", "--family.skip", "1", *PLUGIN]
    status, shown, error = run("init", tiny_llama, "--out", tmp_path / "adapter", *FAST, *words)
    assert status == 0, error
    assert "the same family, uncalibrated" in shown
    config = yaml.safe_load((tmp_path / "adapter" / "config.yaml").read_text(encoding="utf-8"))
    assert config["family"] == {"class_path": "third_party.family.Inputwise", "init_args": {"skip": 1}}
    again = ["--config", tmp_path / "adapter" / "config.yaml", "--out", tmp_path / "again", *PLUGIN]
    status, _, error = run("init", tiny_llama, *again)
    assert status == 0, error
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    status, shown, error = run("evaluate", tiny_llama, "--adapter", tmp_path / "adapter", *SHORT, *PLUGIN)
    assert status == 0, error
    status, shown, error = run("check", tmp_path / "adapter", "--base", tiny_llama, *PLUGIN)
    assert status == 0, error
    families = ["--families", "inputwise", "--recipes", "qera-exact", "--ranks", "4", *PLUGIN]
    fast = [
        "--samples",
        "4",
        "--sequence-length",
        "64",
        "--windows",
        "1",
        "--window-length",
        "64",
        "--baselines",
        "int8",
    ]
    status, shown, error = run("compare", tiny_llama, "--out", tmp_path / "rows", *families, *fast)
    assert status == 0, error
    assert "qera-exact r4 inputwise 4" in shown


@pytest.fixture
def adapter(run, tiny_llama, tmp_path):
    """An adapter on a base that the quantizer of the package has made."""
    words = ["--quantizer", "signs", "--quantizer.groups", "2", "--solver", "careful", "--save-base"]
    words += ["--metric", "loudness", "--metric.exponent", "0.25"]
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "adapter", *FAST, *PLUGIN, *words)
    assert status == 0, error
    return tmp_path / "adapter"


def test_init_evaluate_and_check(run, tiny_llama, adapter, tmp_path):
    sidecar = json.loads((adapter / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["quantizer"] == {"class_path": "third_party.quantizer.Signs", "init_args": {"groups": 2}}
    assert sidecar["metric"] == {"class_path": "third_party.weighting.Loudness", "init_args": {"exponent": 0.25}}
    assert sidecar["solver"] == {"class_path": "third_party.solver.Careful", "init_args": {"damping": 0.5}}
    out = tmp_path / "result.json"
    status, _, error = run("evaluate", tiny_llama, "--adapter", adapter, *SHORT, *PLUGIN, "--json", out)
    assert status == 0, error
    written = json.loads(out.read_text(encoding="utf-8"))["results"]
    again = ["--quantizer", "third_party.quantizer.Signs", "--quantizer.groups", "2"]
    status, _, error = run("evaluate", tiny_llama, "--adapter", adapter, *SHORT, *again, "--json", out)
    assert status == 0, error
    made = json.loads(out.read_text(encoding="utf-8"))["results"]
    for name, result in written.items():
        assert made[name]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert run("check", adapter, "--base", adapter / "base", *PLUGIN)[0] == 0
    status, _, error = run("check", adapter, "--base", tiny_llama, *PLUGIN)
    assert status == 1
    assert "is not quantized" in error


@pytest.mark.slow
def test_check_without_the_package_says_what_to_pass(adapter):
    command = ["-m", "quailora", "check", str(adapter), "--base", str(adapter / "base")]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    told = "got 'third_party.quantizer.Signs'. It is defined in third_party.quantizer: import that first."
    assert f"{told} On the command line, pass --plugin third_party.quantizer." in result.stderr


def test_its_recipe_is_named_with_its_package(run, tiny_llama, tmp_path):
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, "--recipe", "third_party:TAKEN_OFF")
    assert status == 0, error
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["schedule"]["class_path"] == "third_party.schedule.TakenOff"
    assert sidecar["recipe"] == "third_party:TAKEN_OFF"
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "b", *FAST, "--recipe=third_party:NOTHING")
    assert status == 1
    assert "Expected a Recipe named 'NOTHING' in third_party, got NoneType. Recipes there are TAKEN_OFF." in error
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "b", *FAST, "--recipe", "nowhere:NOTHING")
    assert status == 1
    assert "Expected the name of a module that can be imported in nowhere:NOTHING, got 'nowhere'" in error


def test_compare(run, tiny_llama, tmp_path):
    words = ["--windows", "1", "--window-length", "64", "--baselines", "int8", "--ranks", "2"]
    recipes = ["--recipes", "third_party:TAKEN_OFF", "lorc", *PLUGIN, "--quantizer", "signs"]
    status, shown, error = run("compare", tiny_llama, "--out", tmp_path / "c", *FAST[:4], *words, *recipes)
    assert status == 0, error
    assert "third_party:TAKEN_OFF r2" in shown
    assert "lorc r2" in shown
    kept = {row["name"] for row in json.loads((tmp_path / "c" / "results.json").read_text(encoding="utf-8"))["rows"]}
    assert {"third_party:TAKEN_OFF r2", "lorc r2", "quailora r2", "base alone", "int8"} <= kept


def test_a_file_names_the_recipe_of_a_package_only_where_the_command_line_imports_it(tiny_llama, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"recipe": "third_party:TAKEN_OFF"}), encoding="utf-8")
    command = [sys.executable, "-m", "quailora", "init", str(tiny_llama), "--out", str(tmp_path / "a"), "--dry-run"]
    command += ["--config", str(tmp_path / "run.yaml")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "Pass --plugin third_party, too." in refused.stderr


def test_list_shows_it(run):
    RECIPES["taken-off"] = TAKEN_OFF
    status, shown, _ = run("list", *PLUGIN)
    assert status == 0
    assert all(name in shown for name in ("signs", "careful", "loudness", "taken-off"))
