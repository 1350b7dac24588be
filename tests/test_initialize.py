"""`quailora.initialize`: the adapter of a model in memory, calibrated on a data loader, in place."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import save_llama
from helpers import evaluate
from live import EVERY, KINDS, adapted, live_model, saved_hqq
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import forward_fn_dict, prepare_model_inputs_fn_language_modeling
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, Trainer, TrainingArguments

from examples import examples
from quailora import FP4, NF4, Int8, TorchaoInt8, Uniform
from quailora.adapters.lora import LoraScaling
from quailora.adapters.provenance import read_provenance
from quailora.adapters.wrapped import wrapped_layers
from quailora.calibration.text import shipped_text
from quailora.calibration.tokens import CalibrationTokens
from quailora.calibration.windows import Calibration
from quailora.core.objective import Factors
from quailora.errors import ArgumentTypeError, CalibrationError, ConfigurationError, ModelError, TargetError
from quailora.evaluation.check import check
from quailora.methods.block_training import BlockTraining
from quailora.methods.recipes import RECIPES
from quailora.pipeline.initialize import initialize
from quailora.pipeline.initialize_model import initialize_model

CALIBRATION = Calibration(samples=8, sequence_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("initialize") / "model", tokenizer)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return CALIBRATION.windows(tokenizer)


@pytest.fixture(scope="module")
def loader(windows):
    """Four windows at a time, as a trainer would take them."""
    return batches_of(windows)


def batches_of(windows, size=4):
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(size)]


def factors_of(model, adapter="default"):
    return {name: layer.kept() for name, layer in wrapped_layers(model, adapter).items()}


def correction(factors, scale=1.0):
    return scale * factors.lora_B @ factors.lora_A


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        assert all(map(torch.equal, factors, expected[name])), name


def differ(found, expected):
    return all(not torch.equal(correction(factors), correction(expected[name])) for name, factors in found.items())


def assert_close(found, expected, most=1e-3):
    """Corrections agree; factors may be turned against each other where singular values are near."""
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        wanted = correction(expected[name])
        assert (correction(factors) - wanted).norm() <= most * wanted.norm(), name


def written(folder, out, method="quailora", **options):
    """Return the factors in the file that `quailora init` writes."""
    initialize_model(str(folder), method, CALIBRATION, out=out, **options)
    return in_file(load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 16},
        {"lora_alpha": 32},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 8, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 3.0}},
    ],
    ids=["alpha = r", "alpha = 2 r", "alpha = 4 r", "rslora", "patterns"],
)
def test_factors_are_those_of_the_command_line(options, folder, loader, tmp_path):
    """Bit for bit: the same tokens, batches and arithmetic."""
    model = adapted(folder, **options)
    report = initialize(model, loader, weights=str(folder))
    scaling = LoraScaling(
        8,
        float(options["lora_alpha"]),
        options.get("use_rslora", False),
        options.get("rank_pattern", {}),
        options.get("alpha_pattern", {}),
    )
    assert_same(factors_of(model), written(folder, tmp_path / "a", scaling=scaling))
    assert len(report["layers"]) == 14
    assert report["mean_error_share"]["error"] < report["mean_error_share"]["error_uncalibrated"] < 1


BASES = {
    "bitsandbytes-4": lambda *_: NF4(),
    "bitsandbytes-8": lambda *_: Int8(),
    "gptq": lambda *_: Uniform(bits=4, group_size=32),
    "hqq": saved_hqq,  # whose layers keep their scales in another dtype than the quantizer of this name
    "torchao": lambda *_: TorchaoInt8(),
}
"""What `quailora init` is given for the same base, from the folder of the model and one to write to."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_live_base_gives_the_factors_of_its_command(kind, folder, loader, tmp_path):
    model, base = adapted(folder, kind), BASES[kind](folder, tmp_path / "base")
    initialize(model, loader, weights=folder)
    assert_same(factors_of(model), written(folder, tmp_path / "a", scaling=LoraScaling(8), base=base))


@pytest.mark.parametrize("recipe", ["best", "qlora", "lqer", "block-trained"])
def test_recipes_are_those_of_the_command_line(recipe, folder, loader, tmp_path, monkeypatch):
    short = replace(RECIPES["block-trained"], blocks=BlockTraining(10, parts=("factors",)))
    monkeypatch.setitem(RECIPES, "block-trained", short)
    model = adapted(folder)
    initialize(model, loader, recipe=recipe)
    assert_same(factors_of(model), written(folder, tmp_path / "a", recipe, scaling=LoraScaling(8)))


@pytest.mark.parametrize("quantizer", [None, FP4(double_quantization=False)])
def test_a_model_in_full_precision_says_what_is_coming(quantizer, folder, loader, tmp_path):
    """The model is run without its adapters and comes back as it was."""
    model = adapted(folder, model=AutoModelForCausalLM.from_pretrained(folder), modules_to_save=["lm_head"])
    model.train()
    before = {name: (module, module.training) for name, module in model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" not in name}
    initialize(model, loader, quantizer=quantizer)
    expected = written(folder, tmp_path / "a", scaling=LoraScaling(8), base=quantizer)
    assert_same(factors_of(model), expected)
    assert before == {name: (module, module.training) for name, module in model.named_modules()}
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in weights.items())


def test_weights_may_be_a_model_in_memory(folder, loader):
    first, second = adapted(folder), adapted(folder)
    initialize(first, loader, weights=AutoModelForCausalLM.from_pretrained(folder))
    initialize(second, loader, weights=folder)
    assert_same(factors_of(first), factors_of(second))


def test_a_model_that_was_stored_quantized_needs_weights(folder, loader, tmp_path):
    live_model("bitsandbytes-4", folder).save_pretrained(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), LoraConfig(r=8, target_modules=EVERY))
    with pytest.raises(ConfigurationError, match=r"was loaded quantized from .*as weights"):
        initialize(model, loader)
    initialize(model, loader, weights=folder)
    expected = adapted(folder)
    initialize(expected, loader)
    assert_same(factors_of(model), factors_of(expected))
    model.save_pretrained(tmp_path / "adapter")
    origin = read_provenance(tmp_path / "adapter").origin
    assert (origin.checkpoint, origin.needs, origin.model) == (str(tmp_path), "base", str(folder))
    assert check(tmp_path / "adapter", base=tmp_path).layers == 14


# What of a batch is used.


def padded(windows, lengths, side):
    """Return one batch of sequences of these lengths, with padding."""
    ids, mask = torch.full_like(windows, 7), torch.zeros_like(windows)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(windows.shape[1] - length, None)
        ids[row, place], mask[row, place] = windows[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_off(side, folder, windows):
    lengths = [64, 40, 64, 17, 40, 64, 33, 1]
    found, expected = adapted(folder), adapted(folder)
    initialize(found, [padded(windows, lengths, side)])
    sequences = tuple(window[:length] for window, length in zip(windows, lengths, strict=True))
    initialize(expected, CalibrationTokens(sequences, (None,) * len(sequences)))
    assert_same(factors_of(found), factors_of(expected))


def test_packed_sequences_are_taken_apart(folder, windows):
    """As collators without padding write them, with positions that begin again."""
    sequences = [windows[0, :40], windows[1, :10], windows[2, :14]]
    packed = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in sequences])[None],
    }
    found, expected = adapted(folder), adapted(folder)
    initialize(found, [packed])
    initialize(expected, CalibrationTokens(tuple(sequences), (None,) * 3))
    assert_same(factors_of(found), factors_of(expected))


def test_labels_say_which_tokens_count(folder, windows):
    """As in PEFT's EVA, whose settings can switch it off."""
    labels = windows.clone()
    labels[:, :48] = -100
    batch = [{"input_ids": windows, "labels": labels}]
    masked, by_function, plain = adapted(folder), adapted(folder), adapted(folder)
    initialize(masked, batch)
    initialize(by_function, batch, prepare_model_inputs_fn=lambda inputs, _: inputs["labels"] != -100)
    initialize(plain, [{"input_ids": windows}])
    assert_same(factors_of(masked), factors_of(by_function))
    assert differ(factors_of(masked), factors_of(plain))
    config = {"init_lora_weights": "eva", "eva_config": EvaConfig(use_label_mask=False)}
    with pytest.warns(UserWarning, match="lora with eva initialization"):  # of PEFT, to save memory
        switched_off = adapted(folder, **config)
    initialize(switched_off, batch)
    assert_same(factors_of(switched_off), factors_of(plain))


def test_a_mask_with_holes_is_refused(folder, windows):
    mask = torch.ones_like(windows)
    mask[3, 5] = 0
    with pytest.raises(CalibrationError, match=r"row .* has zeros between ones"):
        initialize(adapted(folder), [{"input_ids": windows, "attention_mask": mask}])


def test_the_calling_convention_of_eva(folder, windows, loader):
    """PEFT's own functions, batches that are no mappings, and whatever `forward_fn` makes of them."""
    expected, theirs, by_position, by_name = (adapted(folder) for _ in range(4))
    initialize(expected, loader)
    encoded = DataLoader([BatchEncoding({"input_ids": window}) for window in windows], batch_size=4, collate_fn=stacked)
    initialize(
        theirs,
        encoded,
        forward_fn=forward_fn_dict,
        prepare_model_inputs_fn=prepare_model_inputs_fn_language_modeling,
        adapter_name="default",
        gather_distributed_inputs=True,
        show_progress_bar=False,
    )
    initialize(by_position, [(part, "something else") for part in windows.split(4)], forward_fn=first_part)
    seen = []

    def named(model, batch):
        seen.append((model.device.type, model.config.model_type))
        return model(input_ids=batch["text"], attention_mask=None).logits

    initialize(by_name, [{"text": part} for part in windows.split(4)], forward_fn=named)
    assert seen == [("cpu", "llama")] * 2
    for model in (theirs, by_position, by_name):
        assert_same(factors_of(model), factors_of(expected))


def stacked(rows):
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def first_part(model, batch):
    return model(batch[0])


def test_other_orders_of_the_same_text_give_the_same_corrections(folder, windows):
    """PEFT's test of EVA asks for a cosine of 0.75 between shuffled loaders."""
    models = [adapted(folder) for _ in range(3)]
    for seed, model in enumerate(models):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        initialize(model, batches_of(windows[order], 2), show_progress_bar=False)
    for model in models[1:]:
        for name, factors in factors_of(model).items():
            pair = correction(factors).flatten(), correction(factors_of(models[0])[name]).flatten()
            assert torch.cosine_similarity(*pair, dim=0) > 0.99


def test_more_text_than_is_used_is_said(folder, windows, caplog, monkeypatch):
    monkeypatch.setattr("quailora.calibration.enough.MOST_TOKENS", 256)
    found, expected = adapted(folder), adapted(folder)
    endless = (batch for _ in iter(int, 1) for batch in batches_of(windows))
    initialize(found, endless)
    assert "its first 1 batches, 256 tokens, are used" in caplog.text
    initialize(expected, batches_of(windows)[:1])
    assert_same(factors_of(found), factors_of(expected))
    caplog.clear()
    initialize(expected, CalibrationTokens.of_windows(windows))
    assert "are used" not in caplog.text


def test_reading_ends_with_enough_tokens_that_count(folder, windows, monkeypatch):
    monkeypatch.setattr("quailora.calibration.enough.TOKENS_PER_INPUT", 2)
    model = adapted(folder)
    widest = max(factors.lora_A.shape[1] for factors in factors_of(model).values())
    length = windows.shape[1]
    read = []

    def endless(half: bool = False):
        for index in iter(lambda: len(read), -1):
            ids = windows[index % len(windows)][None]
            labels = ids.clone()
            labels[:, : length // 2 if half else 0] = -100
            read.append(index)
            yield {"input_ids": ids, "labels": labels}

    initialize(model, endless())
    needed = -(-2 * widest // length)
    assert len(read) == needed + 1, "the one that shows that there are more"
    read.clear()
    initialize(model, endless(half=True))
    assert len(read) == -(-2 * widest // (length - length // 2)) + 1
    monkeypatch.setattr("quailora.calibration.enough.MOST_TOKENS", 8 * length)
    read.clear()
    initialize(model, endless(), recipe="distilled")
    assert len(read) == 8 + 1, "distillation trains on all of them"


# What becomes of the model.


def test_a_callback_decides_which_replacements_are_kept(folder, loader):
    model, calls = adapted(folder), []
    before, expected = factors_of(model), adapted(folder)
    initialize(expected, loader)

    def keep_every_second(given, name):
        assert given is model
        calls.append(name)
        return len(calls) % 2 == 0

    initialize(model, loader, callback=keep_every_second)
    assert sorted(calls) == sorted(before)
    for number, name in enumerate(calls):
        kept = factors_of(expected) if number % 2 else before
        assert all(map(torch.equal, factors_of(model)[name], kept[name]))


def test_what_is_saved_tells_its_base(folder, loader, tmp_path):
    """Also where the configuration had no task, of which PEFT would keep no note."""
    for task in ("CAUSAL_LM", None):
        model = adapted(folder, task_type=task)
        initialize(model, loader)
        model.save_pretrained(tmp_path / "adapter")
        origin = read_provenance(tmp_path / "adapter").origin
        assert (origin.model, origin.needs, origin.checkpoint) == (str(folder), "model", None)
        assert origin.built_quantizer == NF4()
        assert check(tmp_path / "adapter", base=folder).layers == 14
        loaded = PeftModel.from_pretrained(live_model("bitsandbytes-4", folder), tmp_path / "adapter")
        assert_same(factors_of(loaded), factors_of(model))
    written(folder, tmp_path / "by-init", scaling=LoraScaling(8))
    assert read_provenance(tmp_path / "by-init").origin == origin
    with pytest.raises(ModelError, match="does not belong on"):
        check(tmp_path / "adapter", base=flipped(folder, tmp_path / "flipped"))


def test_a_base_that_no_quantizer_makes_again_is_asked_for(folder, loader, tmp_path):
    """HQQ leaves no trace of how it has quantized; the adapter still tells its base from others."""
    model = adapted(folder, "hqq")
    initialize(model, loader)
    model.save_pretrained(tmp_path / "adapter")
    assert read_provenance(tmp_path / "adapter").origin.needs == "base"
    with pytest.raises(ModelError, match=r"cannot be made again: .* in memory. Pass it as `base`"):
        evaluate(folder, adapter=tmp_path / "adapter", windows=1, sequence_length=32)
    assert check(tmp_path / "adapter", base=saved_hqq(folder, tmp_path / "base")).layers == 14
    with pytest.raises(ModelError, match="is not quantized, and the base of"):
        check(tmp_path / "adapter", base=folder)


def flipped(folder, to):
    """Save another model of the same shapes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def test_inside_a_trainer(folder, windows, tmp_path):
    """Initialized before the trainer is made, trained, saved by it, loaded again, and still told its base."""
    model = adapted(folder)
    initialize(model, batches_of(windows))
    before = factors_of(model)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=tmp_path / "runs", learning_rate=1e-3, save_strategy="no", **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert differ(factors_of(model), before)
    trainer.save_model(tmp_path / "trained")
    assert check(tmp_path / "trained", base=folder).layers == 14
    loaded = PeftModel.from_pretrained(live_model("bitsandbytes-4", folder), tmp_path / "trained")
    assert_same(factors_of(loaded), factors_of(model))


def test_with_the_loader_of_the_trainer(folder, windows, tmp_path):
    """The trainer may be made first, and its own loader has the tokens that are trained on."""
    rows = [{"input_ids": window, "labels": window} for window in windows]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=tmp_path, learning_rate=1e-3, save_strategy="no", **options)
    model, other = adapted(folder), adapted(folder)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    initialize(model, trainer.get_train_dataloader())
    initialize(other, list(trainer.get_train_dataloader()))
    before = factors_of(model)
    assert_same(before, factors_of(other))
    trainer.train()
    assert differ(factors_of(model), before)


def test_an_optimizer_goes_on_with_the_new_factors(folder, loader):
    """Shapes and objects stay, so nothing that holds them already breaks."""
    model = adapted(folder)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    initialize(model, loader)
    before = factors_of(model)
    model(**loader[0], labels=loader[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert differ(factors_of(model), before)


def test_the_other_adapters_stay_as_they_are(folder, loader):
    model = adapted(folder)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = factors_of(model)
    report = initialize(model, loader, adapter_name="second")
    assert_same(factors_of(model), before)
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]


def test_layers_in_full_precision_keep_their_adapters(folder, loader, caplog):
    model = adapted(folder, target_modules=["q_proj", "lm_head"])
    before = factors_of(model)
    initialize(model, loader)
    assert "Adapters of 1 layers stay as they are" in caplog.text
    after = factors_of(model)
    assert all(map(torch.equal, after["lm_head"], before["lm_head"]))
    assert differ({name: after[name] for name in after if name != "lm_head"}, before)


def test_an_adapter_that_was_trained_is_said_to_be_overwritten(folder, loader, caplog):
    model = adapted(folder)
    initialize(model, loader)
    assert "this is overwritten" not in caplog.text
    expected = factors_of(model)
    for layer in wrapped_layers(model, "default").values():
        layer.parameters.lora_A.data.mul_(2)
    initialize(model, loader)
    assert "this is overwritten" in caplog.text
    assert_same(factors_of(model), expected)


def test_factors_that_wait_for_their_values_are_made(folder, loader):
    """PEFT makes them without data on request, which saves memory before a data-driven start."""
    config = LoraConfig(r=8, target_modules=EVERY, init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(live_model("bitsandbytes-4", folder), config, low_cpu_mem_usage=True)
    initialize(model, loader)
    expected = adapted(folder)
    initialize(expected, loader)
    assert_same(factors_of(model), factors_of(expected))
    assert all(layer.parameters.lora_A.requires_grad for layer in wrapped_layers(model, "default").values())


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"quantizer": NF4()}, ConfigurationError, "quantized already. Leave quantizer out"),
        ({}, {"recipe": "loftq"}, ConfigurationError, "chooses a base of its own, but this model has one already"),
        ({}, {"recipe": "nothing"}, ConfigurationError, "Unknown recipe"),
        ({}, {"adapter_name": "nothing"}, ConfigurationError, "got 'nothing'. It has default"),
        ({"init_lora_weights": "olora"}, {}, ConfigurationError, "got init_lora_weights='olora'"),
        ({"target_modules": ["embed_tokens"]}, {}, TargetError, "there are none"),
        ({}, {"dataloader": []}, ValueError, "dataloader is empty"),
        ({}, {"dataloader": [[1, 2]]}, CalibrationError, "Pass forward_fn to say how"),
        ({}, {"dataloader": [{"text": "a"}]}, CalibrationError, "Expected a matrix of token ids as input_ids"),
        ({}, {"forward_fn": lambda model, batch: None}, CalibrationError, "it did not"),
        ({}, {"prepare_model_inputs_fn": lambda batch, config: 3}, CalibrationError, "for batch 0, got int"),
        ({}, {"prepare_model_inputs_fn": lambda batch, _: batch["input_ids"] < 0}, CalibrationError, "leave none"),
        ({}, {"weights": "/nowhere/at/all"}, ModelError, "Expected a hub name, a folder"),
    ],
)
def test_what_cannot_be_done_is_refused(options, arguments, error, message, folder, loader):
    model = adapted(folder, **options)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        initialize(model, **{"dataloader": loader} | arguments)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_model_without_adapter_is_refused(folder, loader):
    with pytest.raises(ArgumentTypeError, match="Expected a PeftModel, got LlamaForCausalLM"):
        initialize(live_model("bitsandbytes-4", folder), loader)


def test_a_recipe_that_changes_the_base_is_refused(folder, loader):
    model = adapted(folder, model=AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(ConfigurationError, match="chooses a base of its own, but this model has one already"):
        initialize(model, loader, recipe="loftq")


# Several processes.

WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from live import adapted
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
import quailora

_, _, folder, out, *ways = sys.argv
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
windows = load_file(f"{out}/windows.safetensors")["windows"]
for how in ways:
    assert dist.is_initialized() == (how != "not joined yet")
    mine = windows[rank::2] if how == "divided" else windows if rank == 0 or how != "first" else windows[:1]
    model = adapted(folder)
    report = quailora.initialize(
        model, [{"input_ids": row[None]} for row in mine], gather_distributed_inputs=how != "first"
    )
    assert len(report["layers"]) == 14
    assert dist.is_initialized()  # and stays, for a trainer that comes
    save_file(get_peft_model_state_dict(model), f"{out}/{how}-{rank}.safetensors")
"""
WAYS = ("not joined yet", "divided", "same", "first")


@pytest.mark.slow
def test_every_process_gets_the_same_factors(folder, windows, tmp_path):
    """As in a script under torchrun: before the trainer has joined the processes, and after.

    Whether batches are divided among the processes, the same in all of them, or only those of the first count.
    """
    save_file({"windows": windows}, tmp_path / "windows.safetensors")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += map(str, [tmp_path / "worker.py", Path(__file__).parent, folder, tmp_path, *WAYS])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = adapted(folder)
    initialize(expected, batches_of(windows))
    for how in WAYS:
        first, second = (load_file(tmp_path / f"{how}-{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        # Batches of other sizes round to other bfloat16 numbers.
        assert_close(in_file(first), factors_of(expected), most=0.02)


def in_file(tensors):
    """Return the factors of each layer from the tensors of an adapter file."""
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): Factors(
            tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        )
        for name in names
    }


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of the trainer, where there is no GPU
def test_the_example_runs(folder, tmp_path, monkeypatch, capsys):
    """A text file in, a trained adapter out, which belongs on its base."""
    model = shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(shipped_text("calibrate").split("\n\n")[:24]), encoding="utf-8")
    script = Path(__file__).parents[1] / "examples" / "fine_tune.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(model), str(text), str(tmp_path / "tuned")])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(script), run_name="__main__")
    assert "of the output error of quantization is left" in capsys.readouterr().out
    assert check(tmp_path / "tuned", base=model).layers == 14
    assert len([line for line in script.read_text(encoding="utf-8").splitlines() if line]) < 50


def test_the_block_of_the_page_on_training_runs(folder, loader):
    """With the `quantized` and the `dataloader` that the page speaks of."""
    names = {"quantized": live_model("bitsandbytes-4", folder), "dataloader": loader, "MODEL": str(folder)}
    exec(next(block for block in examples("docs/training.md") if "quailora.initialize(" in block), names)
    assert len(names["report"]["layers"]) == 14
    assert all(layer.parameters.lora_B.any() for layer in wrapped_layers(names["model"], "default").values())
