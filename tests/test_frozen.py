"""A correction that stays as it is beside fresh directions that are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from families import make_model, save_llama
from helpers import evaluate, init
from live import live_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file

from quailora import (
    NF4,
    RECIPES,
    LoraScaling,
    Output,
    RecalibrationCallback,
    combine,
    convert,
    factors_of,
    finish,
    freeze,
    initialize,
    initialize_model,
    load,
)
from quailora.adapters.change import TrainedChange
from quailora.adapters.provenance import read_provenance
from quailora.adapters.saved import SavedAdapter
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
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    config = LoraConfig(r=rank, lora_alpha=rank, **options)
    return get_peft_model(live_model("bitsandbytes-4", folder), config)


def train(model, steps=3, optimizer=None, **options):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, 1e-2, **{"weight_decay": 0.0} | options)
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
    for model in (plain, both):  # by plain steps: Adam divides by the size of gradients, so that it amplifies rounding
        train(model, optimizer=torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 30.0))
    for name, layer in wrapped_layers(plain, "default").items():
        found = wrapped_layers(both, "default")[name].parameters
        assert layer.parameters.lora_B.abs().max() > 1e-3
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


def test_rates_of_their_own_for_both_factors(folder):
    """PEFT's groups of parameters keep frozen directions, too."""
    model = fresh(folder, 6)
    initialize(model, BATCHES, weights=str(folder), frozen_rank=4)
    before = {name: layer.kept() for name, layer in wrapped_layers(model, "default").items()}
    train(model, optimizer=create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0))
    for name, layer in wrapped_layers(model, "default").items():
        after = layer.kept()
        assert torch.equal(after.lora_A[:4], before[name].lora_A[:4])
        assert torch.equal(after.lora_B[:, :4], before[name].lora_B[:, :4])
        steps = [change.abs().max().item() for change in (after.lora_A - before[name].lora_A, after.lora_B[:, 4:])]
        assert steps[1] > 2 * steps[0]


def test_weight_decay_stops_the_training_and_loading_does_not(folder):
    model = fresh(folder, 4)
    initialize(model, BATCHES, weights=str(folder), frozen_rank=2)
    saved = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    train(model, 2)
    model.load_state_dict({name: 2 * value for name, value in saved.items()}, strict=False)
    train(model, 4)
    with pytest.raises(ConfigurationError, match="Set weight_decay=0"):
        train(model, 6, weight_decay=0.01)


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


def test_init_writes_fresh_directions_after_the_correction(folder, tmp_path):
    """The correction is that of its rank, whatever the scaling, and the model is the same before training."""
    options = {"samples": 4, "sequence_length": 64, "recipe": "best", "targets": ["q_proj", "down_proj"]}
    init(folder, out=str(tmp_path / "alone"), rank=4, alpha=8.0, **options)
    for name in ("both", "again"):
        init(folder, out=str(tmp_path / name), rank=6, alpha=12.0, frozen_rank=4, **options)
    alone, both, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both", "again")
    )
    for name, factor in both.items():
        assert torch.equal(factor, again[name])
        frozen, fresh = factor.split([4, 2], 0 if "lora_A" in name else 1)
        torch.testing.assert_close(frozen, alone[name], rtol=0, atol=0)
        if "lora_B" in name:
            assert not fresh.any()
        else:
            bound = factor.shape[1] ** -0.5
            assert 0.8 * bound < fresh.abs().max() <= bound
    options = {"windows": 2, "sequence_length": 64}
    scores = [evaluate(folder, adapter=tmp_path / name, **options) for name in ("alone", "both")]
    values = [score.results["quantized + adapter"].perplexity for score in scores]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    card = (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    assert "The correction is in the first 4 directions" in card
    assert card.count("quailora.freeze(model, 4)\n```") == 1
    assert "freeze" not in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "both" / "config.yaml").read_text(encoding="utf-8"))["frozen_rank"] == 4


@pytest.mark.parametrize(("frozen", "options"), [(0, {}), (6, {}), (4, {"rank_pattern": {"q_proj": 3}})])
def test_init_refuses_to_freeze_everything(folder, tmp_path, frozen, options):
    with pytest.raises(ConfigurationError, match="Expected to freeze at least 1 and fewer directions than a layer has"):
        init(folder, out=str(tmp_path / "a"), rank=6, frozen_rank=frozen, samples=4, sequence_length=64, **options)


def test_experts_are_not_frozen(tmp_path):
    model = make_model("Mixtral")
    with pytest.raises(ConfigurationError, match="Directions of fused experts cannot be frozen"):
        initialize_model(
            model,
            replace(RECIPES["quailora"].method(NF4(), LoraScaling(4)), frozen_rank=2),
            [{"input_ids": torch.arange(32)[None]}],
            targets=["experts"],
            out=Output(tmp_path / "a", save_base=True),
        )


def moved(model, before):
    """Return whether training has changed the first and the last direction of each layer."""
    found = {name: layer.kept().lora_A for name, layer in wrapped_layers(model, "default").items()}
    return {
        (not torch.equal(found[name][0], before[name][0]), not torch.equal(found[name][-1], before[name][-1]))
        for name in found
    }


def test_another_call_without_a_frozen_rank_trains_all_directions(folder):
    """As when the cell of a notebook is run again with other arguments."""
    model = fresh(folder, 6)
    for frozen, expected in ((4, (False, True)), (None, (True, True)), (2, (False, True))):
        initialize(model, BATCHES, frozen_rank=frozen)
        before = {name: layer.kept().lora_A for name, layer in wrapped_layers(model, "default").items()}
        train(model)
        assert moved(model, before) == {expected}


def test_what_is_loaded_to_be_trained_stays_frozen(folder, tmp_path):
    """The folder of `init`, and what training has saved of an adapter in memory, say what is frozen."""
    init(str(folder), out=str(tmp_path / "written"), rank=6, frozen_rank=4, samples=4, sequence_length=32)
    model = fresh(folder, 6)
    initialize(model, BATCHES, frozen_rank=4)
    model.save_pretrained(tmp_path / "saved")
    for name in ("written", "saved"):
        loaded = load(tmp_path / name, trainable=True)
        before = {layer: one.kept().lora_A for layer, one in wrapped_layers(loaded, "default").items()}
        train(loaded)
        assert moved(loaded, before) == {(False, True)}


@pytest.fixture
def saved(folder, tmp_path):
    """The folder of an adapter before its training, and that of the trained one, which has no other beside it."""
    model = fresh(folder, 6, target_modules=["q_proj", "down_proj"])
    initialize(model, BATCHES, weights=str(folder), frozen_rank=4)
    start, trained = tmp_path / "elsewhere" / "and" / "deeper" / "start", tmp_path / "trained"
    model.save_pretrained(start)
    train(model)
    model.save_pretrained(trained)
    return start, trained


def test_the_start_of_a_trained_adapter_is_in_its_frozen_directions(saved, tmp_path):
    """The change is the same as with the folder of the start, which need not have been saved."""
    start, trained = saved
    found, named = TrainedChange.read(trained), TrainedChange.read(trained, start)
    assert found.before.folder == trained
    for stem in found.before.stems:
        lora_B, lora_A = found.before.factors(stem)
        expected = named.before.factors(stem)
        torch.testing.assert_close(lora_B @ lora_A, expected.lora_B @ expected.lora_A, rtol=0, atol=0)
    for name, initial in (("found", None), ("named", start)):
        convert(trained, out=tmp_path / name, initial=initial)
    changes = [SavedAdapter.read(tmp_path / name) for name in ("found", "named")]
    for stem in changes[0].stems:
        one, other = (each.factors(stem) for each in changes)
        torch.testing.assert_close(one.lora_B @ one.lora_A, other.lora_B @ other.lora_A, rtol=1e-5, atol=1e-7)


def test_frozen_directions_that_have_moved_are_no_start(saved):
    """As weight decay moves them."""
    _, trained = saved
    file = trained / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=r"save_pretrained wrote after quailora\.initialize"):
        TrainedChange.read(trained)


def test_frozen_directions_of_an_untrained_adapter_are_all_of_it(saved):
    start, _ = saved
    with pytest.raises(ConfigurationError, match="training has changed nothing"):
        TrainedChange.read(start)


def test_a_combined_adapter_has_no_frozen_directions(saved, tmp_path):
    """Its first directions are those of the changes."""
    _, trained = saved
    combine([trained], [0.5], out=tmp_path / "combined")
    origin = read_provenance(tmp_path / "combined").origin
    assert origin.frozen_rank is None
    assert not origin.frozen
    assert read_provenance(trained).origin.frozen_rank == 4


def test_an_adapter_that_has_trained_directions_beside_the_frozen_ones_needs_its_start(folder, tmp_path):
    """Its other directions added something before the training."""
    model = fresh(folder, 6, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    initialize(model, BATCHES, weights=str(folder), frozen_rank=4, callback=lambda _, name: "q_proj" not in name)
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="no adapter in the folders around"):
        TrainedChange.read(tmp_path)


def test_frozen_directions_are_not_fitted_again(folder):
    """Which would train them from then on. All of an adapter can be fitted after it is all trained again."""
    model = fresh(folder, 6)
    initialize(model, BATCHES, weights=str(folder), frozen_rank=4)
    start = factors_of(model)
    with pytest.raises(ConfigurationError, match="`finish` fits all directions of an adapter again"):
        finish(model, BATCHES, initial=start, weights=str(folder))
    with pytest.raises(ConfigurationError, match="`RecalibrationCallback` fits all directions"):
        RecalibrationCallback(model, 2, weights=str(folder))
    freeze(model, 0)
    finish(model, BATCHES, initial=start, weights=str(folder))


@pytest.mark.parametrize("alpha", [6, 96])
def test_a_start_without_a_correction_is_that_of_plain_lora(folder, tmp_path, alpha):
    """Whatever PEFT's scaling is."""
    init(str(folder), out=str(tmp_path / "a"), recipe="qlora", rank=6, alpha=alpha, samples=4, sequence_length=32)
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    for name, tensor in stored.items():
        if "lora_A" in name:
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1.001
        else:
            assert not tensor.any()
