"""The written adapter against stock PEFT, for every scaling and several families."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import make_model
from peft import PeftModel
from safetensors import safe_open

from quailora import NF4, SVD, Initializer, Zero
from quailora.adapters.files import write_adapter
from quailora.adapters.lora import LoraScaling
from quailora.calibration.tokens import CalibrationTokens
from quailora.calibration.walk import Walk
from quailora.core.objective import Factors
from quailora.errors import ConfigurationError
from quailora.evaluation.evaluate import quantize_in_place
from quailora.families import Lora
from quailora.families.lora import lora_correction
from quailora.methods.method import Method
from quailora.models.layers import explicit_targets, linear_layers, select_layers
from quailora.pipeline.run import ModelRun
from quailora.pipeline.store import MemoryStore

SCALINGS = [
    LoraScaling(4),
    LoraScaling(4, alpha=8.0),
    LoraScaling(4, alpha=16.0),
    LoraScaling(4, alpha=0.5),
    LoraScaling(4, rslora=True),
    LoraScaling(4, alpha=16.0, rslora=True),
    LoraScaling(4, 8.0, rank_pattern={"q_proj": 2, r".*\.1\.mlp\.down_proj": 7}),
    LoraScaling(4, 8.0, True, {"o_proj": 6}, {"up_proj": 3.0, "o_proj": 5.0}),
]


@pytest.fixture
def ids(generator):
    return torch.randint(3, 120, (3, 24), generator=generator)


def initialize(model, ids, scaling, solver=SVD(), targets="all-linear"):  # noqa: B008
    layers = select_layers(model, targets)
    walk = Walk(model, layers, CalibrationTokens.of_windows(ids))
    run = ModelRun(walk, layers, {"": Method(Initializer(NF4(), solver), scaling)}, MemoryStore())
    run.finish()
    return layers, {name: stored.correction for name, stored in run.finished("").items()}


def reload(model, folder, layers, corrections, scaling):
    targets = explicit_targets(model, layers)
    write_adapter(folder, corrections, Lora(), scaling, target_modules=targets, base_model="base")
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2", "GPTNeoX", "Bloom"])
def test_stock_peft_reproduces_q_plus_c(family, ids, tmp_path):
    """Law 5, on logits: the base with weights `Q + C`, against `Q` with the adapter."""
    model, scaling = make_model(family), LoraScaling(4, alpha=8.0)
    layers, corrections = initialize(model, ids, scaling)
    quantize_in_place(model, NF4())
    plain = model(ids).logits
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.add_(corrections[name].dense())
        expected = model(ids).logits
        for name, layer in layers.items():
            layer.weight.sub_(corrections[name].dense())
    found = reload(model, tmp_path, layers, corrections, scaling)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - expected).abs().max() < 0.01 * (found - plain).abs().max()  # the adapter does something


@pytest.mark.parametrize("scaling", SCALINGS, ids=repr)
def test_scaling_is_folded_in_once(scaling, ids, tmp_path):
    """Law 5, on weights: PEFT's own `s * B A` is `C`, for every alpha, rslora, and patterns of both."""
    model = make_model("Llama")
    layers, corrections = initialize(model, ids, scaling)
    wrapped = reload(model, tmp_path, layers, corrections, scaling)
    checked = 0
    for name, module in wrapped.base_model.model.named_modules():
        if name in corrections:
            delta = module.get_delta_weight("default")
            torch.testing.assert_close(delta, corrections[name].dense(), rtol=1e-5, atol=1e-7)
            assert module.r["default"] == corrections[name].rank == scaling.rank_of(name)
            assert module.scaling["default"] == pytest.approx(scaling.scale_of(name))
            checked += 1
    assert checked == len(corrections) == 21


def test_error_does_not_depend_on_alpha(ids, tmp_path):
    """The table that PEFT's LoftQ fails: the share of `||W - Q||^2` left, as PEFT applies it, is the same for all."""
    shares = []
    for index, scaling in enumerate(SCALINGS[:6]):
        model = make_model("Llama")
        originals = {name: layer.weight.clone() for name, layer in linear_layers(model).items()}
        layers, corrections = initialize(model, ids, scaling)
        quantize_in_place(model, NF4())
        folder = tmp_path / str(index)
        folder.mkdir()
        wrapped = reload(model, folder, layers, corrections, scaling).merge_and_unload()
        left = sum((m.weight - originals[n]).square().sum() for n, m in linear_layers(wrapped).items())
        none = sum((NF4().quantize(w).dequantize() - w).square().sum() for w in originals.values())
        shares.append((left / none).item())
    assert max(shares) - min(shares) < 1e-4
    assert shares[0] < 0.85


def test_files_are_what_peft_expects(ids, tmp_path):
    model = make_model("Llama")
    layers, corrections = initialize(model, ids, LoraScaling(4), targets=["q_proj", "v_proj"])
    reload(model, tmp_path, layers, corrections, LoraScaling(4))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["init_lora_weights"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "base"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as tensors:
        assert tensors.metadata()["format"] == "pt"
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors.keys()  # noqa: SIM118
        assert tensors.get_tensor("base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight").shape == (16, 4)


def test_zero_start_leaves_the_model_as_it_is_and_trains(ids, tmp_path):
    model = make_model("Llama")
    before = model(ids).logits
    layers, corrections = initialize(model, ids, LoraScaling(4), Zero())
    targets = explicit_targets(model, layers)
    write_adapter(tmp_path, corrections, Lora(), LoraScaling(4), target_modules=targets, base_model="base")
    wrapped = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    torch.testing.assert_close(wrapped(ids).logits, before)
    wrapped(ids, labels=ids).loss.backward()
    gradients = [parameter.grad for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    assert len(gradients) == 21
    assert all(gradient.any() for gradient in gradients)


def test_every_direction_of_an_adapter_gets_gradients(ids, tmp_path):
    """No row and column are both zero, so training can use the whole rank."""
    model = make_model("Llama")
    layers, corrections = initialize(model, ids, LoraScaling(4))
    targets = explicit_targets(model, layers)
    write_adapter(tmp_path, corrections, Lora(), LoraScaling(4), target_modules=targets, base_model="base")
    wrapped = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    wrapped(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in wrapped.named_parameters() if "lora_B" in name}
    assert len(gradients) == 21
    assert [name for name, gradient in gradients.items() if not gradient.any(dim=0).all()] == []


def test_bad_scalings_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected a rank of at least 1, got 0"):
        LoraScaling(0)
    with pytest.raises(ConfigurationError, match="Expected a rank of at least 1, got -2"):
        LoraScaling(4, rank_pattern={"q_proj": -2})
    for alpha in (1e-300, 1e300):
        with pytest.raises(ConfigurationError, match="Expected a lora_alpha between 1e-06 and 1e\\+06, got 1e"):
            LoraScaling(4, alpha=alpha)
    with pytest.raises(ValueError, match="Expected a positive lora_alpha, got 0"):
        LoraScaling(4, alpha=0.0)
    with pytest.raises(ValueError, match="Expected a positive lora_alpha, got inf"):
        LoraScaling(4, alpha_pattern={"q_proj": math.inf})
    correction = lora_correction(Factors(torch.zeros(8, 3), torch.zeros(3, 8)))
    with pytest.raises(ValueError, match="Expected rank 4 in layer, got 3"):
        write_adapter(
            tmp_path, {"layer": correction}, Lora(), LoraScaling(4), target_modules=["layer"], base_model="base"
        )
    assert list(tmp_path.iterdir()) == []
