"""The adapter is fitted again after its training, to the full-precision model with what was trained."""

from __future__ import annotations

import pytest
import torch
from families import save_llama
from live import live_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from quailora import RecalibrationCallback, factors_of, finish, initialize
from quailora.adapters.wrapped import wrapped_layers
from quailora.bases.live import LiveBase
from quailora.core.objective import Factors
from quailora.errors import ConfigurationError
from quailora.models.layers import linear_layers
from quailora.training.recalibrate import turned

IDS = torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": part} for part in IDS.split(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("finish") / "model", tokenizer)


def trained(folder, rank=4, start="quailora"):
    """An adapter with its factors before training, after steps that a training might have taken."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(live_model("bitsandbytes-4", folder), config)
    if start is not None:
        initialize(model, BATCHES, weights=str(folder), recipe=start)
    before = factors_of(model)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 1e-3)
    for ids in IDS.split(4):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


@torch.no_grad()
def distance(model, before, folder):
    """The divergence of the model from full precision with what was trained."""
    full = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in wrapped_layers(model, "default").items():
        change = layer.parameters.lora_B @ layer.parameters.lora_A
        full.get_submodule(name).weight += layer.scale * (change - before[name].lora_B @ before[name].lora_A)
    return full


@torch.no_grad()
def divergence(expected, model):
    first, second = (torch.log_softmax(each.train()(IDS).logits, -1) for each in (expected, model))
    return torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("start", ["quailora", None])
def test_it_comes_closer_to_full_precision_with_what_was_trained(folder, start):
    model, before = trained(folder, start=start)
    target = distance(model, before, folder)
    base = {name: LiveBase(model).weight(name, torch.float32).dequantize() for name in LiveBase(model).layers}
    without = divergence(target, model)
    report = finish(model, BATCHES, initial=None if start is None else before, weights=str(folder), recipe="quailora")
    assert divergence(target, model) < without
    assert report["mean_error_share"]["error"] < 1
    for name, layer in linear_layers(target).items():
        adapted = wrapped_layers(model, "default")[name]
        correction = adapted.scale * adapted.parameters.lora_B @ adapted.parameters.lora_A
        assert (layer.weight - base[name] - correction).norm() < (layer.weight - base[name]).norm()


def test_enough_rank_holds_both(folder):
    """Where the rank is full, the result is the full-precision model with what was trained."""
    model, before = trained(folder, rank=64)
    target = distance(model, before, folder)
    finish(model, BATCHES, initial=before, weights=str(folder), recipe="quailora")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, target(IDS).logits, rtol=0.02, atol=0.02)


def test_the_start_may_be_a_folder_and_the_model_is_left_as_it_is(folder, tmp_path):
    model, before = trained(folder)
    now = factors_of(model)
    for name, layer in wrapped_layers(model, "default").items():
        layer.restore(before[name])
    model.save_pretrained(tmp_path)
    for name, layer in wrapped_layers(model, "default").items():
        layer.restore(now[name])
    full = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: weight.clone() for name, weight in full.state_dict().items()}
    finish(model, BATCHES, initial=tmp_path, weights=full, recipe="quailora")
    found = factors_of(model)
    assert all(torch.equal(weight, weights[name]) for name, weight in full.state_dict().items())
    for name, layer in wrapped_layers(model, "default").items():
        layer.restore(now[name])
    finish(model, BATCHES, initial=before, weights=str(folder), recipe="quailora")
    for name, pair in factors_of(model).items():
        torch.testing.assert_close(pair.lora_B @ pair.lora_A, found[name].lora_B @ found[name].lora_A)


def test_recalibration_during_training(folder, tmp_path):
    """The adapter is fitted on the latest batches, and what training has changed before is not lost."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(live_model("bitsandbytes-4", folder), config)
    initialize(model, BATCHES, weights=str(folder))
    start = factors_of(model)
    callback = RecalibrationCallback(model, 2, weights=str(folder), batches=2, recipe="quailora")
    seen: list[tuple[int, float]] = []

    class Watch(TrainerCallback):
        """Compares before and after the callback, around which it stands."""

        def on_step_end(self, _, state, __, optimizer=None, **___):
            target = distance(model, callback._starts, folder)
            seen.append((state.global_step, divergence(target, model), len(optimizer.state)))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, learning_rate=3e-3, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 2
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Watch(), callback, Watch()])
    trainer.train()
    pairs = {step: [each for each in seen if each[0] == step] for step, *_ in seen}
    for step, (before, after) in pairs.items():
        assert (after[1] < before[1]) == (step in {2, 4})
        assert (after[2] == 0) == (step in {2, 4}), "the optimizer begins anew"
    assert len(callback._starts["model.layers.0.mlp.up_proj"].lora_A) == 4 * 5
    assert not callback._batches
    assert start.keys() == callback._starts.keys()


def test_turned_factors_have_the_same_product_and_are_closer():
    generator = torch.Generator().manual_seed(0)
    before, fitted = (
        Factors(torch.randn(8, 3, generator=generator), torch.randn(3, 6, generator=generator)) for _ in range(2)
    )
    found = turned(fitted, before)
    torch.testing.assert_close(found.lora_B @ found.lora_A, fitted.lora_B @ fitted.lora_A)
    apart = [sum((a - b).square().sum() for a, b in zip(each, before, strict=True)) for each in (found, fitted)]
    assert apart[0] < apart[1]
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    back = turned(Factors(before.lora_B @ rotation.T, rotation @ before.lora_A), before)
    torch.testing.assert_close(back.lora_A, before.lora_A)
    for wrong in ({"every": 0}, {"every": 1, "batches": 0}):
        with pytest.raises(ConfigurationError, match="at least one step and one batch"):
            RecalibrationCallback(None, **wrong)


def test_another_start_and_a_model_in_full_precision_are_refused(folder):
    model, before = trained(folder)
    name = next(iter(before))
    wrong = before | {name: Factors(before[name].lora_B, before[name].lora_A[:, :2])}
    now = factors_of(model)
    for starts in (wrong, {}, {key: before[key] for key in list(before)[1:]}):
        with pytest.raises(
            ConfigurationError, match="Expected the factors of this adapter before training, got others"
        ):
            finish(model, BATCHES, initial=starts, weights=str(folder))
    assert all(torch.equal(pair.lora_A, now[key].lora_A) for key, pair in factors_of(model).items())
    full = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(ConfigurationError, match="Expected a quantized model"):
        finish(full, BATCHES, initial=None)


def gradients(model):
    model.train().zero_grad()
    model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def packed(model):
    """Whether bitsandbytes has packed layers for inference on the CPU."""
    states = [getattr(getattr(part, "weight", None), "quant_state", None) for part in model.modules()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("recipe", ["quailora", "best", "distilled"])
def test_gradients_are_right_after_our_calls(folder, recipe):
    """On some CPUs bitsandbytes' layers of 4 bits pass no gradient once they have run in evaluation mode."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(live_model("bitsandbytes-4", folder).eval(), config)
    base = {name: LiveBase(model).weight(name, torch.float32).dequantize() for name in LiveBase(model).layers}
    initialize(model, BATCHES, weights=str(folder), recipe=recipe)
    finish(model, BATCHES, initial=factors_of(model), weights=str(folder), recipe=recipe)
    assert not packed(model)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in base.items():
            plain.get_submodule(name).weight.copy_(weight)
    plain = get_peft_model(plain, config)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" in name}, strict=False)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_the_way_out_of_the_packing_keeps_gradients(folder):
    """As docs/training.md has it; the first pass in evaluation mode is what packs layers, where the CPU can."""
    torch.manual_seed(0)
    model = live_model("bitsandbytes-4", folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = gradients(model)
    with torch.no_grad():
        model.eval()(IDS[:2])
    assert not packed(model)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
