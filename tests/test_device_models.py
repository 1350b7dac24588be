"""Whole models on a GPU, most often a pretended one: the same as on the CPU, few copies, and its own memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from families import make_model
from helpers import compare, evaluate, init
from safetensors.torch import load_file

from quailora import GPTQ, NF4, AlternatingLeastSquares, Int8, Optimal
from quailora.core.objective import Factors
from quailora.errors import DoesNotFitError
from quailora.evaluation.check import check
from quailora.evaluation.scores import Corrected, measure
from quailora.families.lora import lora_correction
from quailora.methods.block_training import BlockTraining
from quailora.methods.distillation import Distillation
from quailora.methods.recipes import RECIPES
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.pipeline.estimate import _FIXED, Estimate
from quailora.support.machine import within_memory

# In float32, since "auto" would be bfloat16 on some CPUs and on no GPU.
SETTINGS = {"rank": 4, "samples": 4, "sequence_length": 24, "solver": Optimal(), "calibration_dtype": "model"}
EXPERTS = {"targets": ["all-linear", "experts"], "save_base": True}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr("quailora.pipeline.estimate.flops", lambda dtype, device: 1e9)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, tokenizer):
    """The folder of a small random model."""
    folders = {}

    def folder(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return str(folders[family])

    return folder


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    """Adapters made on the CPU, each once."""
    made = {}

    def adapter(model, **options):
        key = repr((model, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cpu") / "adapter"
            init(model, out=str(made[key]), device="cpu", **SETTINGS | options)
        return made[key]

    return adapter


def assert_same_adapter(found, expected):
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2", "Mixtral"])
@pytest.mark.parametrize(
    ("inputs", "offload"),
    [("full", "never"), ("full", "always"), ("quantized", "never"), ("asymmetric", "always")],
)
def test_adapters(family_folder, on_cpu, on_gpu, tmp_path, family, inputs, offload):
    model, options = family_folder(family), {"inputs": inputs, **(EXPERTS if family == "Mixtral" else {})}
    expected = on_cpu(model, **options)
    with on_gpu():
        init(model, out=str(tmp_path / "out"), device="cuda", offload=offload, **SETTINGS | options)
    assert_same_adapter(tmp_path / "out", expected)


@pytest.mark.parametrize("recipe", ["best-joint", "polished", "block-trained-joint"])
def test_recipes(tiny_llama, on_gpu, tmp_path, monkeypatch, recipe):
    """One with a random split, held-out tokens and a base of its own, one that is trained, one block by block."""
    short = replace(RECIPES["distilled"], distillation=Distillation(steps=3, batch=1, sequence_length=24))
    monkeypatch.setitem(RECIPES, "distilled", short)
    blocks = replace(RECIPES["block-trained-joint"], blocks=BlockTraining(steps=3, parts=("scales", "factors")))
    monkeypatch.setitem(RECIPES, "block-trained-joint", blocks)
    options = {**SETTINGS, "solver": AlternatingLeastSquares(), "recipe": recipe, "targets": ["q_proj"]}
    init(str(tiny_llama), out=str(tmp_path / "cpu"), device="cpu", **options)
    with on_gpu():
        init(str(tiny_llama), out=str(tmp_path / "out"), device="cuda", **options)
    assert_same_adapter(tmp_path / "out", tmp_path / "cpu")


@pytest.mark.parametrize("quantizer", [NF4(), Int8(), GPTQ(group_size=16)], ids=repr)
def test_bases_that_are_there(tiny_llama, on_cpu, on_gpu, tmp_path, quantizer):
    model = str(tiny_llama)
    base = str(on_cpu(model, quantizer=quantizer, save_base=True) / "base")
    expected, out = on_cpu(model, base=base, inputs="asymmetric"), tmp_path / "out"
    with on_gpu():
        init(model, out=str(out), device="cuda", base=base, inputs="asymmetric", **SETTINGS)
    assert_same_adapter(out, expected)
    assert check(str(out), base=base, device="cpu").layers == 14
    options = {"adapter": str(out), "base": base, "windows": 2, "sequence_length": 24}
    with on_gpu():
        found = evaluate(model, device="cuda", **options)
    expected = evaluate(model, device="cpu", **options)
    for name, result in expected.results.items():
        assert found.results[name].perplexity == pytest.approx(result.perplexity, rel=1e-3)


@pytest.mark.slow
def test_comparisons(tiny_llama, on_gpu, tmp_path):
    options = {"recipes": ["quailora", "loftq"], "ranks": [2], "baselines": ["int8"], "windows": 2, "window_length": 24}
    options |= {"samples": 4, "sequence_length": 24, "calibration_dtype": "model"}
    rows = {}
    for where, device in (("cpu", nullcontext()), ("cuda", on_gpu())):
        with device:
            found = compare(str(tiny_llama), out=str(tmp_path / where), device=where, **options)
        rows[where] = {row.name: row.scores["shipped text"] for row in found.rows}
    assert len(rows["cpu"]) == 5
    for name, scores in rows["cpu"].items():
        assert rows["cuda"][name].losses == pytest.approx(scores.losses, rel=1e-3)
        assert rows["cuda"][name].divergences == pytest.approx(scores.divergences, rel=1e-2, abs=1e-6)


def prepared(folder, device):
    """Return a model, its layers, their quantized weights on the CPU, and corrections."""
    model = load_model(str(folder), device=device).model
    layers = linear_layers(model)
    generator = torch.Generator().manual_seed(0)
    quantized = {name: layer.weight.cpu().clone() for name, layer in layers.items()}
    factors = {
        name: lora_correction(
            Factors(torch.zeros(layer.shape[0], 2), torch.randn(2, layer.shape[1], generator=generator) / 9)
        )
        for name, layer in layers.items()
    }
    return model, layers, quantized, factors


def test_a_variant_is_copied_once_for_all_windows(tiny_llama, gpu):
    model, layers, quantized, factors = prepared(tiny_llama, "cuda")
    variants = {name: Corrected(quantized, factors, "cuda") for name in "ab"}
    copied = []
    for windows in (2, 6):
        before = gpu.uploaded
        measure(model, layers, variants, torch.arange(windows * 24).view(windows, 24))
        copied.append(gpu.uploaded - before)
    assert copied[0] > 2 * sum(weight.nbytes for weight in quantized.values())
    assert copied[1] - copied[0] == (6 - 2) * 24 * 8  # token ids


def test_few_windows_at_once_give_the_same(tiny_llama, monkeypatch):
    model, layers, quantized, factors = prepared(tiny_llama, "cpu")
    windows = torch.arange(96).view(4, 24)
    variants = {"full precision": {}, "start": Corrected(quantized, factors)}
    expected = measure(model, layers, variants, windows)
    for at_once in (1, 3):
        monkeypatch.setattr("quailora.evaluation.scores.windows_at_once", lambda model, length, size=at_once: size)
        assert measure(model, layers, variants, windows) == expected


@pytest.mark.parametrize("capacity", [None, 10**6])
def test_distillation_copies_quantized_weights_once_if_they_fit(tiny_llama, gpu, capacity):
    model, layers, quantized, factors = prepared(tiny_llama, "cuda")
    size = sum(weight.nbytes for weight in quantized.values())
    gpu.capacity = capacity and gpu.used + 2 * size - 1
    windows = torch.arange(4 * 12).view(4, 12)
    before = gpu.uploaded
    trained = Distillation(steps=4, batch=1, sequence_length=12).train(
        model, layers, quantized, factors, windows, "model"
    )
    copies = 4 if capacity else 1
    start = sum(tensor.nbytes for one in factors.values() for tensor in one.parameters.values())
    assert gpu.uploaded - before == copies * size + start + windows.nbytes
    assert all(tensor.device.type == "cuda" for one in trained.values() for tensor in one.parameters.values())


def test_a_gpu_has_its_own_memory(tiny_llama, gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(_FIXED, "cuda", 0)
    options = {**SETTINGS, "out": str(tmp_path / "out")}
    gpu.capacity = 10**9
    needed = init(str(tiny_llama), dry_run=True, **options)
    assert isinstance(needed, Estimate)
    assert needed.available == 8 * 10**8
    assert needed.verdict == "fits in GPU memory"
    gpu.capacity = (needed.in_memory + needed.streamed) * 5 // 8
    assert init(str(tiny_llama), dry_run=True, **options).verdict.startswith("fits block by block")
    init(str(tiny_llama), **options)
    with pytest.raises(DoesNotFitError, match=r"the run needs about 1 MiB of GPU memory with the weights left on disk"):
        init(str(tiny_llama), memory_limit="1kB", **options | {"out": str(tmp_path / "no")})


@pytest.mark.parametrize("bytes_free", [50_000, 180_000])  # not enough for the model, or for what comes after
def test_a_full_gpu_is_one_line(tiny_llama, gpu, tmp_path, bytes_free):
    gpu.capacity = bytes_free
    options = {**SETTINGS, "out": str(tmp_path / "out"), "offload": "never"}
    with pytest.raises(
        DoesNotFitError, match=r"^The memory is full \(CUDA out of memory.*\)\. Try `offload='always'`.*$"
    ):
        init(str(tiny_llama), **options)


def test_a_full_machine_is_one_line():
    with (
        pytest.raises(DoesNotFitError, match=r"^The memory is full \(.*allocate.*\)\. Try less\.$"),
        within_memory("less"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), within_memory("less"):
        raise RuntimeError("another")
