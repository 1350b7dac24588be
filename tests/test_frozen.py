"""A correction that stays as it is beside fresh directions that are trained."""

from __future__ import annotations

import pytest
import torch
from families import save_llama
from live import live_model
from peft import LoraConfig, PeftModel, get_peft_model

from quailora import freeze, initialize
from quailora.adapters.wrapped import wrapped_layers
from quailora.errors import ConfigurationError

IDS = torch.arange(64).view(2, 32)
BATCHES = [
    {"input_ids": torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_llama(tmp_path_factory.mktemp("frozen") / "model", tokenizer)


def fresh(folder, rank, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(live_model("bitsandbytes-4", folder), config)


def train(model, steps=3, **options):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, **{"weight_decay": 0.0} | options)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_correction_stays_and_the_rest_is_trained(folder):
    """The frozen directions are those that an adapter of their rank gets, and the model starts as with that one."""
    alone, both = fresh(folder, 4), fresh(folder, 6)
    drawn = {name: layer.kept().lora_A[4:] for name, layer in wrapped_layers(both, "default").items()}
    initialize(alone, BATCHES, weights=str(folder))
    initialize(both, BATCHES, weights=str(folder), frozen_rank=4)
    alone.train(), both.train()
    with torch.no_grad():
        torch.testing.assert_close(both(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-4)
    before = {name: layer.kept() for name, layer in wrapped_layers(both, "default").items()}
    for name, layer in wrapped_layers(alone, "default").items():
        torch.testing.assert_close(before[name].lora_A[:4], layer.parameters.lora_A.detach(), rtol=0, atol=0)
        torch.testing.assert_close(before[name].lora_A[4:], drawn[name], rtol=0, atol=0)
        assert not before[name].lora_B[:, 4:].any()
    train(both)
    for name, layer in wrapped_layers(both, "default").items():
        after = layer.kept()
        assert torch.equal(after.lora_A[:4], before[name].lora_A[:4])
        assert torch.equal(after.lora_B[:, :4], before[name].lora_B[:, :4])
        assert not torch.equal(after.lora_A[4:], before[name].lora_A[4:])
        assert after.lora_B[:, 4:].all()


def test_fresh_directions_get_the_gradients_of_plain_lora(folder):
    """Beside a frozen correction of zero, training is that of an adapter without it."""
    plain, both = fresh(folder, 2), fresh(folder, 6)
    with torch.no_grad():
        for name, layer in wrapped_layers(both, "default").items():
            layer.parameters.lora_A[4:] = wrapped_layers(plain, "default")[name].parameters.lora_A
    freeze(both, 4)
    train(plain), train(both)
    for name, layer in wrapped_layers(plain, "default").items():
        found = wrapped_layers(both, "default")[name].parameters
        torch.testing.assert_close(found.lora_A[4:], layer.parameters.lora_A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.lora_B[:, 4:], layer.parameters.lora_B, rtol=1e-4, atol=1e-5)


def test_freezing_again_after_loading_and_not_at_all(folder, tmp_path):
    model = fresh(folder, 4)
    initialize(model, BATCHES, weights=str(folder), frozen_rank=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(live_model("bitsandbytes-4", folder), tmp_path, is_trainable=True)
    layer = next(iter(wrapped_layers(loaded, "default").values()))
    freeze(loaded, 1)
    freeze(loaded, 2)  # in place of the first call
    before = layer.kept()
    train(loaded, 1)
    assert torch.equal(layer.parameters.lora_A[:2], before.lora_A[:2])
    freeze(loaded, 0)
    train(loaded, 1)
    assert not torch.equal(layer.parameters.lora_A[:2], before.lora_A[:2])


@pytest.mark.parametrize("rank", [-1, 4, 5])
def test_a_direction_has_to_be_left(folder, rank):
    with pytest.raises(ConfigurationError, match="Expected to freeze at least 0 and fewer directions than a layer has"):
        freeze(fresh(folder, 6, rank_pattern={"q_proj": 4}), rank)


def test_a_bad_rank_is_refused_before_anything_is_run(folder):
    model = fresh(folder, 4)
    before = wrapped_layers(model, "default")["model.layers.0.mlp.up_proj"].kept()
    for rank in (0, 4):
        with pytest.raises(ConfigurationError, match="Expected"):
            initialize(model, [], weights=str(folder), frozen_rank=rank)
    assert torch.equal(wrapped_layers(model, "default")["model.layers.0.mlp.up_proj"].parameters.lora_A, before.lora_A)
