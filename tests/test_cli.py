"""The command line from end to end, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml

from quailora import FAMILIES, GPTQ, NF4, SVD, Optimal, Quantizer, Solver, Uniform
from quailora.cli.components import Component
from quailora.cli.main import main
from quailora.errors import ModelError
from quailora.support.files import new_folder
from quailora.support.settings import build, describe

FAST = ["--samples", "4", "--sequence-length", "64", "--rank", "4"]


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    """An adapter made by the default solver."""
    folder = tmp_path_factory.mktemp("adapters") / "default"
    assert main(["init", str(tiny_llama), "--out", str(folder), *FAST]) == 0
    return folder


def test_init_writes_everything(adapter, tiny_llama):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "quailora.json",
        "report.json",
    ]
    assert [path.name for path in adapter.parent.iterdir()] == ["default"]  # no temporary folder is left
    report = json.loads((adapter / "report.json").read_text(encoding="utf-8"))
    assert report["calibration_tokens"] == 256
    assert set(report["phases"]) == {"load", "initialize", "write"}
    assert all(phase["seconds"] >= 0 and phase["peak_memory_mib"] > 0 for phase in report["phases"].values())
    assert {"quailora", "torch", "transformers", "peft", "bitsandbytes"} <= set(report["versions"])
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        slack = 1e-6 * layer["error_none"]
        assert layer["error_optimal"] <= layer["error"] + slack
        assert layer["error"] <= layer["error_uncalibrated"] + slack
        assert layer["error_uncalibrated"] <= layer["error_none"] + slack
        assert layer["tokens"] == 256
        assert layer["rank"] == 4
        assert 4 < layer["bits_per_weight"] < 4.5
        assert 0 < layer["relative_error"] < 0.1


def test_card_says_where_the_adapter_belongs(adapter, tiny_llama):
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"---\nbase_model: {tiny_llama}\n")
    assert "belongs on the quantized base and on no other" in card
    assert "NF4(block_size=64, double_quantization=True)" in card
    assert "| down_proj | 2 |" in card


def test_snippet_of_the_card_runs(adapter, tmp_path):
    """The card's own code, with stock packages, in a process of its own."""
    card = (adapter / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(adapter))
    code += (
        "\nimport sys\nassert 'quailora' not in sys.modules\nprint(type(base.model.layers[0].mlp.down_proj).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "Linear4bit"


def test_evaluate_takes_the_quantizer_from_the_adapter(run, adapter, tiny_llama, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--windows", "3", "--sequence-length", "100", "--json", out]
    status, shown, _ = run("evaluate", tiny_llama, "--adapter", adapter, *arguments)
    assert status == 0
    assert "quantized + adapter" in shown
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["quantizer"] == repr(NF4())
    assert list(content["results"]) == ["full precision", "quantized", "quantized + adapter"]
    full, quantized, adapted = (entry["perplexity"] for entry in content["results"].values())
    assert content["results"]["quantized"]["tokens"] == 3 * 99
    assert abs(adapted - full) < abs(quantized - full)


def test_config_file_with_overrides(run, adapter, tiny_llama, tmp_path):
    """A saved configuration runs again, and the command line wins over it."""
    out = tmp_path / "again"
    status, _, error = run("init", "--config", adapter / "config.yaml", "--out", out, "--rank", "3", tiny_llama)
    assert status == 0, error
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    first = yaml.safe_load((adapter / "config.yaml").read_text(encoding="utf-8"))
    assert config == first | {"rank": 3}


def test_a_base_is_no_contradiction_of_the_default_quantizer(run, tiny_llama, tmp_path):
    """NF4 that was asked for beside a base is refused; the configuration of a run on a base runs again."""
    few = ["--samples", "4", "--sequence-length", "32", "--rank", "2", "--targets", "q_proj"]
    made, again = tmp_path / "made", tmp_path / "again"
    assert run("init", tiny_llama, *few, "--out", made, "--quantizer", "gptq", "--save-base")[0] == 0
    on_base = ["--base", made / "base", "--out", tmp_path / "a"]
    status, _, error = run("init", tiny_llama, *few, *on_base, "--quantizer", "nf4")
    assert status != 0
    assert "Expected --quantizer or --base, got both" in error
    assert run("init", tiny_llama, *few, *on_base)[0] == 0
    status, _, error = run("init", tiny_llama, "--config", tmp_path / "a" / "config.yaml", "--out", again)
    assert status == 0, error


@pytest.mark.parametrize(
    "quantizer", ["uniform", {"class_path": "uniform", "init_args": {"bits": 3}}, {"class_path": "Uniform"}], ids=str
)
def test_short_names_in_a_file(run, tiny_llama, tmp_path, quantizer):
    config = {"out": str(tmp_path / "a"), "quantizer": quantizer, "solver": "svd", "rank": 3, "targets": ["q_proj"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    status, _, error = run("init", tiny_llama, *FAST[:4], "--config", tmp_path / "run.yaml")
    assert status == 0, error
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    bits = 3 if "init_args" in quantizer else 4
    assert build(Quantizer, sidecar["quantizer"]) == Uniform(bits=bits)
    assert build(Solver, sidecar["solver"]) == SVD()


def test_unknown_name_in_a_file(run, tiny_llama, tmp_path):
    (tmp_path / "run.yaml").write_text("solver: nonsense\n", encoding="utf-8")
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", "--config", tmp_path / "run.yaml")
    assert status == 1
    assert "Unknown solver 'nonsense'. Expected one of quailora, svd, optimal, zero" in error


def test_same_seed_same_bytes(run, adapter, tiny_llama, tmp_path):
    status, _, _ = run("init", tiny_llama, "--out", tmp_path / "again", *FAST)
    assert status == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_components_with_fields(run, tiny_llama, tmp_path):
    arguments = [
        "--quantizer",
        "gptq",
        "--quantizer.bits",
        "3",
        "--solver=optimal",
        "--solver.damping=0.01",
        "--rslora",
    ]
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, *arguments)
    assert status == 0, error
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    assert build(Quantizer, sidecar["quantizer"]) == GPTQ(bits=3)
    assert build(Solver, sidecar["solver"]) == Optimal(damping=0.01)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] is True
    # A calibrated base is quantized again from the adapter's own record.
    out = tmp_path / "result.json"
    status, _, error = run(
        "evaluate", tiny_llama, "--adapter", tmp_path / "a", "--windows", "2", "--sequence-length", "64", "--json", out
    )
    assert status == 0, error
    assert json.loads(out.read_text(encoding="utf-8"))["quantizer"] == repr(GPTQ(bits=3))


def test_saved_base_is_what_the_adapter_was_made_for(run, tiny_llama, tmp_path):
    """For quantizers that stock transformers cannot load: the dequantized base stands beside the adapter."""
    from transformers import AutoModelForCausalLM

    status, _, error = run(
        "init",
        tiny_llama,
        "--out",
        tmp_path / "a",
        *FAST,
        "--quantizer",
        "uniform",
        "--save-base",
        "--base-format",
        "dequantized",
        "--targets",
        "q_proj",
    )
    assert status == 0, error
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base")
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name in ("q_proj", "k_proj"):
        weight = getattr(original.model.layers[0].self_attn, name).weight
        expected = Uniform().quantize(weight).dequantize()
        torch.testing.assert_close(getattr(base.model.layers[0].self_attn, name).weight, expected, check_dtype=False)
    assert '"path/to/this/folder/base", dtype' in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_a_base_that_depends_on_corrections_is_evaluated_as_saved(run, tiny_llama, tmp_path):
    """GPTQ on the inputs of the quantized network cannot be made again from the model and calibration text alone."""
    made = ["--quantizer", "gptq", "--inputs", "quantized", "--rank", "4", "--samples", "4", "--sequence-length", "32"]
    evaluated = ["--windows", "2", "--sequence-length", "64", "--json", tmp_path / "result.json"]
    assert run("init", tiny_llama, "--out", tmp_path / "a", *made)[0] == 0
    status, _, error = run("evaluate", tiny_llama, "--adapter", tmp_path / "a", *evaluated)
    assert status == 1
    assert "--save-base" in error
    made += ["--save-base", "--base-format", "dequantized"]
    assert run("init", tiny_llama, "--out", tmp_path / "b", *made)[0] == 0
    assert run("evaluate", tiny_llama, "--adapter", tmp_path / "b", *evaluated)[0] == 0
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["results"]
    assert run("evaluate", tmp_path / "b" / "base", *evaluated)[0] == 0
    base = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["results"]
    assert found["quantized"]["perplexity"] == pytest.approx(base["full precision"]["perplexity"], rel=1e-6)


def test_existing_results_are_kept_unless_asked(run, tiny_llama, tmp_path):
    out = tmp_path / "a"
    assert run("init", tiny_llama, "--out", out, *FAST)[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    status, _, error = run("init", tiny_llama, "--out", out, *FAST)
    assert status == 1
    assert "already holds a result" in error
    assert "--overwrite" in error
    assert run("init", tiny_llama, "--out", out, *FAST, "--overwrite", "--solver", "optimal")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_failure_loses_nothing(tmp_path):
    out = tmp_path / "a"

    def fail():
        with new_folder(out, overwrite=False) as partial:
            (partial / "adapter_config.json").write_text("{}", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "65"], "layers cannot carry the rank they were given"),
        (["--rank-pattern", '{"query": 2}'], "The pattern 'query' means none of the 14 target layers"),
        (["--targets", "attention"], "'attention' matches no linear layer"),
        (["--samples", "100000"], "Use a longer text, fewer samples or a shorter sequence length"),
        (["--sequence-length", "300"], "sequence length of at most 256"),
        (["--calibration", "missing.txt"], "'missing.txt' does not exist"),
        (["--alpha", "0"], "Expected a positive lora_alpha"),
        (["--quantizer", "uniform", "--quantizer.bits", "9"], "Expected 2 to 8 bits, got 9"),
        (["--solver", "nonsense"], "Unknown solver 'nonsense'. Expected one of quailora, svd, optimal, zero"),
        (["--quantizer", "Nonsense"], "quantizer"),
        (["--bogus", "1"], "bogus"),
    ],
)
def test_bad_input_is_one_clear_line(run, tiny_llama, tmp_path, arguments, message):
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, *arguments)
    assert status != 0
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_nan_weight_names_the_layer(run, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "broken")
    status, _, error = run("init", tmp_path / "broken", "--out", tmp_path / "a", *FAST)
    assert status == 1
    assert "model.layers.1.mlp.down_proj" in error
    assert "NaN" in error
    assert not (tmp_path / "a").exists()


def test_evaluate_refuses_a_folder_without_adapter(run, tiny_llama, tmp_path):
    status, _, error = run("evaluate", tiny_llama, "--adapter", tmp_path)
    assert status == 1
    assert "Expected an adapter folder" in error


def test_evaluate_refuses_another_base_unless_asked(run, tiny_llama, adapter, caplog):
    arguments = ["--adapter", adapter, "--quantizer", "int8", "--windows", "1", "--sequence-length", "64"]
    status, _, error = run("evaluate", tiny_llama, *arguments)
    assert status == 1
    assert "was not made for Int8(): 14 of 14 layers have other codes or scales" in error
    status, _, _ = run("evaluate", tiny_llama, *arguments, "--any-base")
    assert status == 0
    assert "was not made for Int8()" in caplog.text


def test_lists_are_typed_as_words(run, tiny_llama, tmp_path):
    data = tmp_path / "data.jsonl"
    record = {"prompt": "What is light? ", "response": "Light is what we see by. " * 200}
    data.write_text(json.dumps(record), encoding="utf-8")
    words = ["--calibration", data, "--calibration-fields", "prompt", "response", "--targets", "q_proj", "mlp.up_proj"]
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, *words)
    assert status == 0, error
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["q_proj", "up_proj"]
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["calibration"]["text"]["fields"] == ["prompt", "response"]


def test_compare_prints_a_table_and_goes_on(run, tiny_llama, tmp_path):
    arguments = ["--samples", "4", "--sequence-length", "64", "--windows", "2", "--window-length", "64"]
    common = (
        "compare",
        tiny_llama,
        "--out",
        tmp_path / "out",
        "--quantizer",
        "uniform",
        "--ranks",
        "2",
        "4",
        *arguments,
    )
    status, shown, _ = run(*common, "--recipes", "lorc", "best")
    assert status == 0
    assert all(f"{name} r{rank}" in shown for name in ("quailora", "lorc", "asymmetric-half") for rank in (2, 4))
    status, shown, _ = run(*common, "--recipes", "lorc", "qera-exact")
    assert status == 0
    assert "qera-exact r4" in shown
    status, _, errors = run(*common, "--recipes", "lorca")
    assert status == 1
    assert "Unknown recipe 'lorca'" in errors
    assert "Did you mean lorc?" in errors


def test_init_by_recipe(run, tiny_llama, tmp_path):
    assert run("init", tiny_llama, "--out", tmp_path / "out", "--recipe", "srr", *FAST)[0] == 0
    sidecar = json.loads((tmp_path / "out" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["schedule"]["class_path"] == "srr"
    assert (tmp_path / "out" / "base").is_dir()
    status, _, errors = run("init", tiny_llama, "--out", tmp_path / "x", "--recipe", "srr", "--solver", "svd", *FAST)
    assert status == 1
    assert "A recipe decides solver, metric and inputs" in errors


def test_list_names_every_component(run):
    status, shown, _ = run("list")
    assert status == 0
    for name in ("nf4", "fp4", "int8", "uniform", "gptq", "zero", "svd", "quailora", "optimal"):
        assert name in shown
    assert all(f"{name} *" in shown for name in ("loftq", "caldera", "best-joint"))
    assert "best *" not in shown
    assert all(f"│ {name} " in shown for name in ("lora (default)", "dora", "adalora"))
    assert shown.count("(default)") == 5


def test_help_teaches(run):
    status, shown, _ = run("init", "--help")
    assert status == 0
    for text in ("--sequence-length", "--quantizer", "--overwrite", "lora_alpha; the rank by default"):
        assert text in shown
    status, shown, _ = run("init", "--quantizer.help", "gptq")
    assert status == 0
    assert "--quantizer.damping" in shown


def test_module_runs():
    result = subprocess.run([sys.executable, "-m", "quailora", "list"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "quailora" in result.stdout


def test_unknown_component_in_a_sidecar_is_refused():
    with pytest.raises(ModelError, match=r"got 'os\.system'. It is defined in os: import that first"):
        build(Quantizer, {"class_path": "os.system", "init_args": {}})
    with pytest.raises(ModelError, match="has no field wings"):
        build(Quantizer, describe(NF4()) | {"init_args": {"wings": 2}})


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_can_be_named(name):
    """Also those with a solver of their own, which is the field of an object; and that with another one."""
    assert Component(name).made("family") == FAMILIES[name]()
    if hasattr(FAMILIES[name](), "solver"):
        assert Component(name, words=("--family.solver", "SVD")).made("family").solver == SVD()
