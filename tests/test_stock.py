"""Bases and adapters in an environment of stock packages, where quailora is not installed: `make stock`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import save_llama
from helpers import evaluate, init
from peft import PeftModel
from questions import save_task
from safetensors.torch import load_file
from trainings import train
from transformers import AutoModelForCausalLM

from examples import examples
from quailora import (
    GPTQ,
    NF4,
    Calibration,
    LoraScaling,
    Optimal,
    StoredBase,
    TextSource,
    Uniform,
    initialize_model,
    merge,
    rebase,
)
from quailora.adapters.convert import convert
from quailora.calibration.text import shipped_text
from quailora.errors import ModelError
from quailora.evaluation.check import check
from quailora.evaluation.evaluate import quantize_in_place
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.scales import ScaleTraining
from quailora.merging.training import MergeTraining
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import find_recipe
from quailora.models.locate import resolve

PYTHON = os.environ.get("QUAILORA_STOCK")
SCRIPTS = Path(__file__).parents[1] / "benchmarks"
WINDOWS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="`make stock` sets up the other environment"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("all_threads"),
]


def stock(*command, folder="/", check=True):
    """Run the other interpreter in a folder, away from this package; return what it printed."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    command = [str(part) for part in (PYTHON, *command)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout if check else done.stderr


def perplexities(base, adapter, text):
    """Return what the stock packages find for a base, and for an adapter on it, if there is one."""
    script = SCRIPTS / "stock_perplexity.py"
    adapters = [] if adapter is None else [adapter]
    printed = stock(script, base, *adapters, "--text", text, "--windows", WINDOWS, "--dtype", "bfloat16")
    lines = [line.rpartition(": ")[2] for line in printed.splitlines() if line.startswith(("base: ", f"{adapter}: "))]
    return [float(line) for line in lines]


def test_quailora_is_not_there():
    assert "No module named 'quailora'" in stock("-c", "import quailora", check=False)


@pytest.mark.parametrize("bits", [4, 3])
def test_our_gptq_base(bits, shared_data, tmp_path):
    """Loaded by transformers and gptqmodel, with the adapter by PEFT: our own perplexity."""
    seen, text = str(shared_data / "wikitext2_valid.txt"), str(shared_data / "wikitext2_raw_test.txt")
    quantizer = GPTQ(bits=bits)
    init("demo", out=str(tmp_path / "a"), quantizer=quantizer, solver=Optimal(), calibration=seen, save_base=True)
    results = evaluate("demo", adapter=str(tmp_path / "a"), text=text, windows=WINDOWS).results
    ours = [results[name].perplexity for name in ("quantized", "quantized + adapter")]
    theirs = perplexities(tmp_path / "a" / "base", tmp_path / "a", text)
    print(f"{bits} bits: base and adapter {ours} here, {theirs} by stock packages")
    assert theirs == pytest.approx(ours, rel=0.005)


def assert_same_logits(code, model, folder):
    """Let the stock packages compute logits from the base and the adapter in a folder, and compare them with ours."""
    stock("-c", code, folder / "a/base", folder / "a", folder / "logits.pt")
    ours = AutoModelForCausalLM.from_pretrained(model)
    quantize_in_place(ours, StoredBase(str(folder / "a/base")))
    ours = PeftModel.from_pretrained(ours, folder / "a").eval()
    expected = torch.load(folder / "logits.pt")
    torch.testing.assert_close(ours(torch.arange(64)[None]).logits, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("group_size", [32, 64])
def test_trained_blocks_of_two_bits(group_size, tokenizer, tmp_path):
    """What gptqmodel and PEFT compute from a trained base of 2 bits and its adapter is what the run has written."""
    model = save_llama(tmp_path / "model", tokenizer)
    recipe = replace(find_recipe("block-trained-joint"), blocks=BlockTraining(20, 128, parts=("scales", "factors")))
    calibration, base = Calibration(samples=64, sequence_length=64), Uniform(2, group_size)
    result = initialize_model(
        str(model), recipe, calibration, scaling=LoraScaling(8, 16.0), base=base, out=tmp_path / "a"
    )
    assert any(layer["block_error_trained"] < layer["block_error"] for layer in result.report["layers"])
    code = (
        "import sys, torch, transformers, peft; config = transformers.GPTQConfig(bits=2, backend='gptq_torch'); "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, "
        "quantization_config=config); model = peft.PeftModel.from_pretrained(model, sys.argv[2]).eval(); "
        "torch.save(model(torch.arange(64)[None]).logits.float(), sys.argv[3])"
    )
    assert_same_logits(code, model, tmp_path)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_base_of_many_bits(bits, tokenizer, tmp_path):
    """gptqmodel loads layers of their own bits and groups and in full precision, and PEFT the adapter: our logits."""
    model, block = save_llama(tmp_path / "model", tokenizer), "model.layers.0"
    quantizers = {
        f"{block}.self_attn.q_proj": Uniform(8, 64),
        f"{block}.self_attn.k_proj": Uniform(8, None),
        f"{block}.self_attn.o_proj": Uniform(4, 32),
        f"{block}.self_attn.v_proj": Uniform(3, 32),
        f"{block}.mlp.down_proj": None,
        "model.layers.1.mlp.up_proj": Uniform(2, 32),
    }
    method = find_recipe("best-joint").method(Uniform(bits, 64), LoraScaling(8, 16.0), quantizers=quantizers)
    initialize_model(str(model), method, Calibration(samples=16, sequence_length=64), out=tmp_path / "a")
    code = (
        "import sys, torch, gptqmodel, peft; "
        "model = gptqmodel.GPTQModel.load(sys.argv[1], backend='gptq_torch', dtype=torch.float16, device='cpu').model; "
        "model = peft.PeftModel.from_pretrained(model.float(), sys.argv[2]).eval(); "
        "torch.save(model(torch.arange(64)[None]).logits.float(), sys.argv[3])"
    )
    assert_same_logits(code, model, tmp_path)


def test_base_of_gptqmodel(shared_data, tmp_path):
    """An adapter for it closes half of its gap, and belongs on no other base."""
    seen, text = str(shared_data / "wikitext2_valid.txt"), str(shared_data / "wikitext2_raw_test.txt")
    model, script = resolve("demo"), SCRIPTS / "stock_quantize.py"
    stock(script, model, tmp_path / "theirs", "--text", seen)
    init("demo", out=str(tmp_path / "a"), base=str(tmp_path / "theirs"), solver=Optimal(), calibration=seen)
    results = evaluate("demo", adapter=str(tmp_path / "a"), text=text, windows=WINDOWS).results
    full, *ours = (result.perplexity for result in results.values())
    theirs = perplexities(tmp_path / "theirs", tmp_path / "a", text)
    closed = (ours[0] - ours[1]) / (ours[0] - full)
    print(f"gptqmodel's base and adapter {ours} here, {theirs} by stock packages; {closed:.1%} of the gap to {full}")
    assert theirs == pytest.approx(ours, rel=0.005)
    assert closed > 0.5
    assert check(str(tmp_path / "a"), base=str(tmp_path / "theirs")).layers == 210
    for name, options in {"seed": ["--seed", 1], "group": ["--group-size", 32]}.items():
        stock(script, model, tmp_path / name, "--text", seen, "--samples", 8, *options)
        with pytest.raises(ModelError, match="210 of 210 layers have other codes or scales"):
            check(str(tmp_path / "a"), base=str(tmp_path / name))


def test_awq(tokenizer, tmp_path):
    """What transformers and gptqmodel compute from an AWQ checkpoint is what we have written, and read in it."""
    model = save_llama(tmp_path / "model", tokenizer)
    quantizer = Uniform(group_size=32)
    init(str(model), out=str(tmp_path / "a"), quantizer=quantizer, rank=4, samples=4, sequence_length=64,
         save_base=True, base_format="awq")  # fmt: skip
    base = tmp_path / "a" / "base"
    code = (
        "import sys, torch, transformers; config = transformers.AwqConfig(backend='torch_awq'); "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16, "
        "quantization_config=config); torch.save(model(torch.arange(64)[None]).logits.float(), sys.argv[2])"
    )
    stock("-c", code, base, tmp_path / "logits.pt")
    ours = AutoModelForCausalLM.from_pretrained(model)
    quantize_in_place(ours, StoredBase(str(base)))
    expected = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(ours(torch.arange(64)[None]).logits, expected, rtol=1e-2, atol=2e-3)


@pytest.fixture
def adapter(tokenizer, tmp_path):
    """A small model with an end token, an adapter for it, and its base."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = save_llama(tmp_path / "model", tokenizer)
    init(str(model), out=str(tmp_path / "adapter"), rank=4, samples=4, sequence_length=64, save_base=True)
    return tmp_path / "adapter"


def test_trl_trains_an_adapter(adapter, tmp_path):
    """The blocks of the page on training, one after the other; `convert` takes what comes out."""
    blocks = examples("docs/training.md")
    load, train = (next(one for one in blocks if name in one) for name in ("PeftModel.from_pretrained(", "SFTTrainer("))
    texts = [shipped_text("evaluate")[start : start + 200] for start in range(0, 3200, 200)]
    given = f"MODEL = {str(tmp_path / 'model')!r}"
    data = f"from datasets import Dataset; dataset = Dataset.from_dict({{'text': {texts!r}}})"
    train = train.replace('output_dir="runs"', 'output_dir="runs", use_cpu=True')
    stock("-c", f"{given}\n{load}\n{data}\n{train}", folder=tmp_path)
    found, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "adapter"))
    assert found.keys() == before.keys()
    moved = [name for name in found if not torch.equal(found[name].float(), before[name].float())]
    assert len(moved) == len(found)
    convert(str(tmp_path / "trained"), initial=str(adapter), out=str(tmp_path / "change"))


def test_lm_eval_loads_a_base_and_its_adapter(adapter, tmp_path):
    """The command of the page on training, on a task of our own in place of one that has to be fetched."""
    (line,) = (block for block in examples("docs/training.md", "console") if "lm_eval" in block)
    command = line.split()[2:-2]
    save_task(tmp_path)
    options = ["--include_path", tmp_path, "--tasks", "questions", "--output_path", tmp_path / "scores"]
    stock("-m", "lm_eval", *command, *options, "--device", "cpu", folder=tmp_path)
    (file,) = (tmp_path / "scores").rglob("*.json")
    assert 0 <= json.loads(file.read_text(encoding="utf-8"))["results"]["questions"]["acc,none"] <= 1


@pytest.fixture(scope="module")
def trained(all_threads, shared_data, tmp_path_factory):
    """A trained adapter on NF4, and what merging and moving it is calibrated on."""
    seen, folder = str(shared_data / "wikitext2_valid.txt"), tmp_path_factory.mktemp("nf4")
    init("demo", out=str(folder / "start"), rank=8, calibration=seen, samples=8, solver=Optimal())
    train(folder / "start", folder / "trained", by=0.2)
    return folder / "trained", Calibration(TextSource(seen), samples=8)


@pytest.mark.parametrize("into", [NF4(), GPTQ()], ids=["nf4", "gptq"])
def test_a_merged_model(into, trained, shared_data, tmp_path):
    """Stock packages find our own perplexity of it."""
    adapter, calibration = trained
    text = str(shared_data / "wikitext2_raw_test.txt")
    merge(
        adapter,
        into,
        out=tmp_path / "merged",
        calibration=calibration,
        texts=EvaluationTexts(windows=0),
        training=MergeTraining(BlockTraining(2, windows=8), ScaleTraining(2)),
    )
    ours = evaluate("demo", base=str(tmp_path / "merged"), text=text, windows=WINDOWS).results["quantized"].perplexity
    (theirs,) = perplexities(tmp_path / "merged", None, text)
    print(f"merged into {into.name}: {ours} here, {theirs} by stock packages")
    assert theirs == pytest.approx(ours, rel=0.005)


def test_a_moved_adapter(trained, shared_data, tmp_path):
    """Stock packages find our own perplexities of its new base and of itself."""
    adapter, calibration = trained
    text = str(shared_data / "wikitext2_raw_test.txt")
    rebase(adapter, out=tmp_path / "moved", base=GPTQ(bits=3), calibration=calibration)
    results = evaluate("demo", adapter=str(tmp_path / "moved"), text=text, windows=WINDOWS).results
    ours = [results[name].perplexity for name in ("quantized", "quantized + adapter")]
    theirs = perplexities(tmp_path / "moved" / "base", tmp_path / "moved", text)
    print(f"moved to 3 bits: base and adapter {ours} here, {theirs} by stock packages")
    assert theirs == pytest.approx(ours, rel=0.005)
