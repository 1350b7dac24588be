"""What people type and write down: options, configuration files, and what they are told when it is wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import yaml

import quailora
from quailora import NF4, Quantizer, Uniform
from quailora.cli.arguments import arguments_of, taken_components
from quailora.cli.commands import COMMANDS
from quailora.cli.parser import as_options
from quailora.errors import ConfigurationError
from quailora.support.settings import build, describe

FAST = ["--samples", "4", "--sequence-length", "64", "--rank", "4"]


def test_components_are_taken_out_where_they_are_meant():
    options = ("quantizer", "solver")
    typed, rest = taken_components(options, ["nf4", "--quantizer", "gptq", "--quantizer.bits", "3", "--rank", "4"])
    assert rest == ["nf4", "--rank", "4"]
    assert typed == {"quantizer": ("gptq", ("--quantizer.bits", "3")), "solver": (None, ())}
    typed, rest = taken_components(options, ["--quantizer.symmetric", "nf4", "--solver=svd", "--no-quantizer.mse"])
    assert rest == ["nf4"]
    assert typed == {"quantizer": (None, ("--quantizer.symmetric", "--no-quantizer.mse")), "solver": ("svd", ())}
    with pytest.raises(ConfigurationError, match="Expected a value for --solver, got ''"):
        taken_components(options, ["--solver"])


CANARY = """
from dataclasses import dataclass
from pathlib import Path
import quailora
from quailora import Quantizer, Uniform
Path({ran!r}).touch()
@dataclass(frozen=True)
class Canary(Quantizer):
    def encode(self, weight, statistics):
        return Uniform(bits=3).encode(weight, statistics)
    def stock_config(self):
        return None
"""


def test_a_configuration_file_imports_nothing_by_itself(run, tiny_llama, tmp_path, monkeypatch):
    """A file may name a class of a module only after the command line has asked for that module."""
    (tmp_path / "canary.py").write_text(CANARY.format(ran=str(tmp_path / "ran")), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "run.yaml"
    for content in (
        {"quantizer": {"class_path": "canary.Canary"}},
        {"quantizer": "canary.Canary"},
        {"solver": {"class_path": "canary.Canary"}},
        {"rank_pattern": {"class_path": "canary.Canary"}},
        {"targets": [{"class_path": "canary.Canary"}]},
        {"quantizer": ["canary"]},
    ):
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, "--config", file)
        assert status in {1, 2}, content
        assert "canary" in error
        assert not (tmp_path / "ran").exists(), content
    file.write_text(yaml.safe_dump({"quantizer": {"class_path": "canary.Canary"}}), encoding="utf-8")
    command = ("init", tiny_llama, "--out", tmp_path / "a", *FAST, "--config", file)
    status, _, error = run(*command, "--plugin", "canary")
    assert status == 0, error
    assert (tmp_path / "ran").exists()
    status, _, error = run(*command, "--plugin=nowhere")
    assert status == 1
    assert "got 'nowhere'" in error


@pytest.mark.parametrize(
    "option", ["rank", "samples", "seed", "targets", "quantizer", "solver", "metric", "calibration_fields", "rslora"]
)
def test_empty_options_in_a_file_are_left_out(run, tiny_llama, tmp_path, option):
    (tmp_path / "run.yaml").write_text(f"{option}: null\n", encoding="utf-8")
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", "--dry-run", "--config", tmp_path / "run.yaml")
    assert status == 0, error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"solver: {class_path: quailora, init_args: {damping: null}}", "Expected a value for the field damping"),
        (b"quantizer: {class_path: gptq, init_args: [3]}", "as a mapping under init_args, got [3]"),
        (b"rank: 4 # \xf2", "Expected YAML in UTF-8 in the configuration file"),
        (b"rank: [", "run.yaml"),
        (b"rnak: 4", "Expected options of init in the configuration file, got 'rnak'. Did you mean rank?"),
        (
            b"plugin: os",
            "Expected options of init in the configuration file, got 'plugin'. Pass it on the command line.",
        ),
        (b"targets: q_proj", "Expected a list for targets in the configuration file, such as [q_proj], got 'q_proj'."),
        (
            b"quantizer: {init_args: {bits: 3}}",
            "as a name, or as a mapping of class_path and init_args, got {'init_args'",
        ),
        (
            b"quantizer: {class_path: gptq, init_args: {bis: 3}}",
            "Expected fields of GPTQ in the configuration file (bits,",
        ),
        (b"- rank", "Expected options and their values in the configuration file"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_meant_is_refused(run, tiny_llama, tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", "--config", tmp_path / "run.yaml")
    assert status in {1, 2}
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("dash", ["-", "_"])
def test_options_are_spelled_with_either_dash(dash):
    words = ["demo", "--out", "a_b", "--save_base", "--no_overwrite", "--no_quantizer.double_quantization"]
    words += ["--quantizer.block_size", "128", "--base_format=auto"]
    typed = [word.replace("_", dash) if word.startswith("--") else word for word in words]
    found = arguments_of("init", COMMANDS["init"], typed)
    assert (found["out"], found["save_base"], found["overwrite"]) == ("a_b", True, False)
    assert found["quantizer"].made("quantizer") == NF4(block_size=128, double_quantization=False)


@pytest.mark.parametrize(
    "words",
    [["--rank", "null"], ["--samples=null"], ["--solver.iterations", "~"], ["--quantizer.double_quantization=null"]],
    ids=" ".join,
)
def test_options_without_a_value_are_refused(run, tiny_llama, tmp_path, words):
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", "--dry-run", *words)
    assert status == 1
    assert f"Expected a value for {words[0].partition('=')[0]}, got" in error


def test_one_group_a_row_can_be_typed(run, tiny_llama, tmp_path):
    words = ["--quantizer", "uniform", "--quantizer.group_size", "null", "--dry-run"]
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *words)
    assert status == 0, error


def test_one_group_a_row_can_be_written_down(run, tiny_llama, tmp_path):
    content = "quantizer: {class_path: uniform, init_args: {group_size: null}}"
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    status, _, error = run("init", tiny_llama, "--out", tmp_path / "a", *FAST, "--config", tmp_path / "run.yaml")
    assert status == 0, error
    sidecar = json.loads((tmp_path / "a" / "quailora.json").read_text(encoding="utf-8"))
    assert build(Quantizer, sidecar["quantizer"]) == Uniform(group_size=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["init", "--targets", "q_proj", "demo", "--out", "x"],
            "Expected MODEL, which is missing. Write it right after",
        ),
        (["init", "demo"], "Expected --out, which is missing. See: quailora init --help"),
        (["init", "demo", "--out", "x", "--rank", "a"], "--rank: Expected int, got a. See: quailora init --help"),
        (["init", "demo", "--out", "x", "--rank-pattern", "y"], "Expected dict[str, int], NoneType, got y"),
        (["init", "demo", "--out", "x", "--bogus", "1"], "Unknown options or words: --bogus 1"),
        (
            ["init", "demo", "--out", "x", "--offlod", "never"],
            "--offlod never. Did you mean --offload? See: quailora init",
        ),
        (["nonsense"], "There is no command 'nonsense'. Expected one of init, evaluate"),
        (["innit"], "demo, list. Did you mean init? See: quailora --help"),
        ([], "Expected a command: init, evaluate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_in_arguments_are_one_line(run, arguments, message):
    status, shown, error = run(*arguments)
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not shown


def test_a_component_that_cannot_be_written_down_is_refused():
    class Plain(Quantizer):
        def encode(self, weight, statistics):
            return Uniform().encode(weight, statistics)

        def stock_config(self):
            return None

    with pytest.raises(
        ConfigurationError, match=r"Expected plain data or a frozen dataclass, got .* of the class Plain"
    ):
        describe({"quantizer": Plain()})


@pytest.mark.parametrize("words", [["--help"], ["init", "--help"], ["compare", "--help"], ["list"]], ids=" ".join)
def test_help_waits_for_no_heavy_package(words):
    modules = ("torch", "transformers", "peft", "scipy", "bitsandbytes", "pandas", "datasets", "jaxtyping")
    code = (
        "import sys\nfrom contextlib import suppress\nfrom quailora.cli.main import main\n"
        f"with suppress(SystemExit):\n    main({words})\n"
        f"print([name for name in {modules} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_list_that_is_read_from_the_source_is_that_of_the_classes():
    """In a process of its own, where no other test has defined a class."""
    code = "from quailora.cli.listing import imported_rows, source_rows; assert source_rows() == imported_rows()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_level_names_are_those_of_the_table():
    assert sorted(name for names in quailora._HOMES.values() for name in names) == sorted(quailora.__all__)
    assert all(getattr(quailora, name) is not None for name in quailora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        quailora.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Pass `save_base=True`.", "Pass --save-base."),
        ("Try `dtype=float32`, or `device=cpu`.", "Try --dtype float32, or --device cpu."),
        ("Try `device='cpu'`.", "Try --device cpu."),
        ("Try `targets=['q_proj', 'v_proj']`.", "Try --targets q_proj v_proj."),
        ('Try `rank_pattern={"gate": 1}`.', """Try --rank-pattern '{"gate": 1}'."""),
        ("Name another `model`, or `base`.", "Name another MODEL, or --base."),
        (
            "Log in with `hf auth login`; `load_into` is no option.",
            "Log in with `hf auth login`; `load_into` is no option.",
        ),
    ],
)
def test_messages_speak_of_options_on_the_command_line(said, shown):
    assert as_options(said, list(COMMANDS.values())) == shown


def test_options_of_the_command_that_runs_come_first():
    commands = list(COMMANDS.values())
    assert as_options("Name the `model`.", [COMMANDS["convert"], *commands]) == "Name the --model."


def test_errors_and_warnings_of_a_command_speak_of_options(run, monkeypatch, caplog):
    def refused(*, base: str = "") -> None:
        logging.getLogger("quailora").warning("Leave out `%s`.", "base")
        raise ConfigurationError("Expected a `base`.")

    monkeypatch.setitem(COMMANDS, "check", refused)
    status, _, error = run("check")
    assert status == 1
    assert "Expected a --base." in error
    assert "Leave out --base." in caplog.text
