"""Which layers get an adapter: found on models without weights, checked against the models themselves."""

from __future__ import annotations

import peft
import pytest
import torch
from families import FAMILIES, make_model
from family_sweep import small_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quailora.adapters.files import write_adapter
from quailora.adapters.lora import LoraScaling, expert_stacks
from quailora.adapters.peft_check import dropped
from quailora.adapters.written import check_files
from quailora.calibration.empty_pass import find_reach
from quailora.calibration.walk import collect_statistics
from quailora.core.objective import Factors
from quailora.errors import ModelError, NumericalError, TargetError
from quailora.families import Lora
from quailora.families.lora import lora_correction
from quailora.models.layers import all_layers, explicit_targets, linear_layers, select_layers, stock_quantizes
from quailora.pipeline.targets import plan_adapter, typed_targets

ALL = ["all-linear"]


def empty(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def endings(names):
    return {name.rpartition(".")[2] for name in names}


def reached(model):
    """The layers that a real model calls, and the type of what they return."""
    found, hooks = {}, []
    for name, layer in linear_layers(model).items():
        hooks.append(layer.module.register_forward_hook(lambda *values, n=name: found.update({n: type(values[2])})))
    with torch.no_grad():
        model(input_ids=torch.randint(3, 300, (2, 32)))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "kind", ["bart", "gemma3", "llama4_text", "mamba", "modernbert-decoder", "qwen2_moe", "roberta", "rwkv"]
)
def test_a_model_without_weights_shows_what_text_reaches(kind):
    config = small_config(kind)
    reach, model = find_reach(empty(config)), AutoModelForCausalLM.from_config(config).eval()
    found = reached(model)
    assert reach.known
    assert reach.silent == linear_layers(model).keys() - found.keys()
    assert reach.odd == {name for name, kind in found.items() if kind is not torch.Tensor}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_share_an_input_are_found_without_weights(family):
    model = empty(make_model(family).config)
    reach = find_reach(model)
    assert {name for group in reach.shared for name in group} == linear_layers(model).keys()
    fused = len(reach.shared) == len(linear_layers(model))  # one matrix for all that have the same input
    assert fused == (family in {"Bloom", "GPTNeoX", "GPT2", "Phi3"})
    assert len(reach.distinct(linear_layers(model))) == len(reach.shared)


@pytest.mark.parametrize(
    ("kind", "left_out", "reason"),
    [
        ("glm4_moe", {"gate_proj", "up_proj", "down_proj"}, "PEFT drops their factors"),
        ("mamba", {"dt_proj"}, "text never reaches them"),
        ("mamba2", {"out_proj"}, r"PEFT refuses them \(ValueError: .*incompatible"),
        ("llama4_text", {"router"}, "they do not turn one input into one output"),
        ("gemma3", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, "text never reaches them"),
    ],
)
def test_what_cannot_get_an_adapter_leaves_all_linear_with_a_word(kind, left_out, reason, caplog):
    model = empty(small_config(kind))
    plan = plan_adapter(model, ALL, LoraScaling(4))
    gone = linear_layers(model).keys() - plan.layers.keys()
    assert left_out <= endings(gone)
    assert plan.layers
    assert any(line.startswith("Leaving out") for line in caplog.messages)
    with pytest.raises(TargetError, match=f"cannot get an adapter: .*{reason}.*Try `targets="):
        plan_adapter(model, [*typed_targets(model, plan.layers), min(gone)], LoraScaling(4))
    again = plan_adapter(model, typed_targets(model, plan.layers), LoraScaling(4))
    assert again.layers.keys() == plan.layers.keys()


def test_stock_transformers_decides_what_its_base_quantizes(tmp_path):
    """Falcon's own class of linear layers is not quantized: an adapter would correct what is not there."""
    for kind in ("falcon", "llama4_text", "gemma3"):
        model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / kind)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / kind, quantization_config=settings)
        quantized = {name for name, module in base.named_modules() if type(module).__name__ == "Linear4bit"}
        assert quantized == {name for name, layer in linear_layers(model).items() if stock_quantizes(layer)}
    with pytest.raises(TargetError, match=r"No layer is left.*full precision, see `save_base`"):
        plan_adapter(empty(small_config("falcon")), ALL, LoraScaling(4), stock=True)
    assert plan_adapter(empty(small_config("falcon")), ALL, LoraScaling(4)).layers


def test_small_layers_get_a_smaller_rank_and_keep_their_scale(caplog):
    model = empty(small_config("qwen2_moe"))
    for asked in (LoraScaling(4, 8.0), LoraScaling(4, 8.0, rslora=True, alpha_pattern={"shared_expert_gate": 3.0})):
        plan = plan_adapter(model, ALL, asked)
        gates = [name for name in plan.layers if name.endswith("shared_expert_gate")]
        assert gates
        for name in plan.layers:
            assert plan.scaling.rank_of(name) == (1 if name in gates else 4)
            assert plan.scaling.scale_of(name) == pytest.approx(asked.scale_of(name))
    assert "Rank 1, the largest they can carry, for: shared_expert_gate (2)." in caplog.messages
    with pytest.raises(TargetError, match=r"cannot carry the rank.*`rank_pattern={\"shared_expert_gate\": 1}`"):
        plan_adapter(model, ["q_proj", "shared_expert_gate"], LoraScaling(4))
    with pytest.raises(TargetError, match="cannot carry the rank"):
        plan_adapter(model, ALL, LoraScaling(4, rank_pattern={"shared_expert_gate": 2}))
    with pytest.raises(TargetError, match="cannot carry the rank"):
        plan_adapter(model, ALL, LoraScaling(5000))


def test_the_head_is_no_target(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(TargetError, match="'lm_head' is the output head, which is never quantized"):
        select_layers(model, ["lm_head"])
    with pytest.raises(TargetError, match=r"'norm' means model\.norm, which is no linear layer"):
        select_layers(model, ["norm"])


def test_what_lies_between_body_and_head_is_calibrated():
    model = AutoModelForCausalLM.from_config(small_config("modernbert-decoder")).eval()
    ids, seen = torch.randint(3, 300, (2, 24)), []
    layers = {"lm_head.dense": linear_layers(model)["lm_head.dense"]}
    model.lm_head.dense.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids)
    expected = seen.pop().double()
    found = collect_statistics(model, layers, ids, "model")["lm_head.dense"].second_moment.double()
    torch.testing.assert_close(found, expected.T @ expected / len(expected), rtol=1e-4, atol=1e-6)


def test_tensors_in_the_wrong_place_are_found(tiny_llama, monkeypatch):
    """Names and shapes can be right and the layers wrong: the check follows each tensor."""
    model = empty(AutoModelForCausalLM.from_pretrained(tiny_llama).config)
    layers = select_layers(model, ["gate_proj", "up_proj"])
    assert dropped(model, layers, LoraScaling(4), Lora(), run=True) == set()
    plain = peft.set_peft_model_state_dict

    def swapping(adapted, tensors, **options):
        names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        swapped = {}
        for key, tensor in tensors.items():
            old = next(name for name in names if name in key)
            swapped[key.replace(old, names[old])] = tensor
        return plain(adapted, swapped, **options)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", swapping)
    assert dropped(model, layers, LoraScaling(4), Lora(), run=False) == set(layers)


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_written_files_are_read_back(family, tmp_path, generator):
    model = make_model(family)
    layers, scaling = all_layers(model), LoraScaling(4, 8.0)
    corrections = {name: random_correction(layer.shape, generator) for name, layer in layers.items()}
    targets = explicit_targets(model, layers)
    stacks = expert_stacks(layers)
    write_adapter(tmp_path, corrections, Lora(), scaling, target_modules=targets, base_model="base", experts=stacks)
    check = (tmp_path, empty(model.config), layers, corrections, Lora(), scaling)
    check_files(*check)
    file = tmp_path / "adapter_model.safetensors"
    wrote = load_file(file)
    first = next(key for key in wrote if "q_proj" in key)
    damaged = {
        "NaN or infinite": wrote | {first: wrote[first] * torch.inf},
        "is not the correction": wrote | {first: wrote[first] * 1.001},
        "does not load the adapter that was made whole": {k: v for k, v in wrote.items() if k != first},
        "cannot load": wrote | {first: wrote[first][:2]},
    }
    for message, tensors in damaged.items():
        save_file(tensors, file)
        with pytest.raises((ModelError, NumericalError), match=message):
            check_files(*check)
    save_file(wrote, file)
    assert len(PeftModel.from_pretrained(model, tmp_path).peft_config) == 1


def random_correction(shape, generator):
    lora_A, lora_B = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    return lora_correction(Factors(lora_B, lora_A))
