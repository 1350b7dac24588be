"""Walking through a model block by block, against running it whole."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, make_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from quailora import NF4, AlternatingLeastSquares, Initializer, InputStatistics
from quailora.calibration.blocks import find_chain
from quailora.calibration.tokens import CalibrationTokens
from quailora.calibration.walk import Walk, collect_statistics
from quailora.errors import CalibrationError, ModelError, NumericalError, named
from quailora.models.layers import Layer, all_layers, linear_layers, select_layers
from quailora.models.load import load_model
from quailora.models.weights import is_offloaded, replaced, resident


def walked(model, layers, ids, inputs="full", dtype="auto"):
    """What a walk finds out about the inputs of layers, which stay as they are."""
    found = {}

    def visit(block):
        found.update({one.layer.name: one for one in block.drain()})
        return {name: layer.weight for name, layer in block.layers.items()}

    Walk(model, layers, CalibrationTokens.of_windows(ids), inputs, dtype).run(visit)
    return found


@pytest.fixture
def ids(generator):
    return torch.randint(3, 300, (3, 20), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(family, ids):
    """Plain hooks on the model as transformers runs it, for every linear layer."""
    model = make_model(family)
    layers = linear_layers(model)
    seen = {name: [] for name in layers}
    hooks = [
        layer.module.register_forward_pre_hook(lambda _, arguments, name=name: seen[name].append(arguments[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    found = collect_statistics(model, layers, ids, "model")
    for name, inputs in seen.items():
        expected = InputStatistics.from_inputs(torch.cat(inputs)).second_moment
        torch.testing.assert_close(found[name].second_moment, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_an_expert_sees_what_the_router_sends_it(family, ids):
    """Recomputed from the experts' arguments; on top comes the average expert, as many tokens as the input is wide."""
    model = make_model(family)
    name, experts = next((name, module) for name, module in model.named_modules() if hasattr(module, "gate_up_proj"))
    calls = []
    hook = experts.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    with torch.no_grad():
        model(ids)
    hook.remove()
    hidden, chosen, _ = calls[0]
    width = hidden.shape[-1]
    layers = {key: layer for key, layer in all_layers(model).items() if layer.group == f"{name}.gate_up_proj"}
    inputs = walked(model, layers, ids, dtype="model")
    sent = [hidden[(chosen == expert).any(-1)].double() for expert in range(len(layers))]
    assert [one.tokens for one in inputs.values()] == [len(tokens) for tokens in sent]
    pool = sum(tokens.T @ tokens for tokens in sent) / sum(map(len, sent))
    for tokens, one in zip(sent, inputs.values(), strict=True):
        expected = (tokens.T @ tokens + width * pool) / (len(tokens) + width)
        torch.testing.assert_close(one.statistics.second_moment, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_gets_the_average(ids):
    model = make_model("Qwen3Moe")
    inputs = walked(model, select_layers(model, ["experts"]), ids[:1, :2], dtype="model")
    silent = [one for one in inputs.values() if one.tokens == 0]
    assert silent
    for one in silent:
        assert one.statistics.second_moment.diagonal().sum() > 0


def test_quantized_inputs_are_those_after_the_replaced_blocks(tiny_llama, ids):
    """Each group of layers sees what the model computes with all layers before it changed, also in its own block."""
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    before = collect_statistics(model, layers, ids, "model")
    changed: dict[str, torch.Tensor] = {}
    groups = []

    def visit(block):
        groups.append([name.rpartition(".")[2] for name in block.layers])
        other = load_model(str(tiny_llama)).model
        with replaced(linear_layers(other), changed):
            expected = collect_statistics(other, linear_layers(other), ids, "model")
        for one in block.drain():
            found = one.statistics.second_moment
            torch.testing.assert_close(found, expected[one.layer.name].second_moment, rtol=1e-5, atol=1e-7)
        weights = {name: 0.5 * layer.weight for name, layer in block.layers.items()}
        changed.update(weights)
        return weights

    Walk(model, layers, CalibrationTokens.of_windows(ids), "quantized", "model").run(visit)
    assert groups == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    after = collect_statistics(model, layers, ids, "model")  # and the model is as it was
    for name in layers:
        torch.testing.assert_close(after[name].second_moment, before[name].second_moment, rtol=0, atol=0)


def test_offloaded_weights_come_and_go(tiny_llama, tmp_path, ids):
    model = load_model(str(tiny_llama), offload=tmp_path).model
    assert is_offloaded(model)
    layer = linear_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.shape == (64, 96)
    assert layer.module.weight.device.type == "meta"
    expected = load_model(str(tiny_llama)).model
    with resident(model.model.layers[0]):
        torch.testing.assert_close(layer.weight, expected.model.layers[0].mlp.down_proj.weight)
    assert layer.module.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_models_that_are_no_chain_are_run_whole(tiny_llama, tmp_path, ids, monkeypatch):
    model = load_model(str(tiny_llama)).model
    layers = linear_layers(model)
    expected = collect_statistics(model, layers, ids, "model")
    forward = type(model.model).forward

    def reversed_and_back(self, *arguments, **named):
        self.layers = nn.ModuleList(reversed(self.layers))
        try:
            return forward(self, *arguments, **named)
        finally:
            self.layers = nn.ModuleList(reversed(self.layers))

    monkeypatch.setattr(type(model.model), "forward", reversed_and_back)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be run block by block: .*layers"):
        find_chain(model, ids[:1, :4])
    found = collect_statistics(model, layers, ids, "model")
    name = "model.layers.0.self_attn.q_proj"
    assert (found[name].second_moment - expected[name].second_moment).norm() > 0
    with pytest.raises(ModelError, match=r"block by block.*in memory only, on full-precision inputs"):
        walked(model, layers, ids, "quantized")
    offloaded = load_model(str(tiny_llama), offload=tmp_path).model
    with pytest.raises(ModelError, match=r"block by block.*in memory only"):
        collect_statistics(offloaded, linear_layers(offloaded), ids)


def test_blocks_that_share_more_than_hidden_states_are_no_chain(tiny_llama, ids, monkeypatch):
    model = load_model(str(tiny_llama)).model
    block = type(model.model.layers[0])
    plain = block.forward

    def with_memory(self, hidden, **named):
        named.pop("memory", None)
        return plain(self, hidden, **named)

    monkeypatch.setattr(block, "forward", with_memory)

    def handing_on(self, input_ids=None, **named):
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, memory=hidden * 2)
        return BaseModelOutputWithPast(hidden)

    monkeypatch.setattr(type(model.model), "forward", handing_on)
    with pytest.raises(ModelError, match="more than hidden states from earlier blocks"):
        find_chain(model, ids[:1, :4])


def test_too_few_windows_to_hold_some_out(tiny_llama, ids):
    model = load_model(str(tiny_llama)).model
    with pytest.raises(CalibrationError, match=r"at least 4 calibration samples for asymmetric inputs.*got 3"):
        walked(model, linear_layers(model), ids, "asymmetric")


def test_inputs_that_are_overwritten_are_refused(tiny_llama, ids, monkeypatch):
    model = load_model(str(tiny_llama)).model
    mlp = type(model.model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, hidden: plain(self, hidden) + hidden.mul_(0))
    with pytest.raises(ModelError, match=r"overwrites the input of model\.layers\.0\.mlp\.gate_proj after use"):
        collect_statistics(model, linear_layers(model), ids)


def test_what_a_model_raises_is_one_line(tiny_llama, ids, monkeypatch):
    """In a block that is run on calibration windows, and in the stubbed run that looks for blocks."""
    model = load_model(str(tiny_llama)).model
    mlp, plain = type(model.model.layers[0].mlp), type(model.model.layers[0].mlp).forward

    def breaking(self, hidden):
        if self is model.model.layers[1].mlp:
            raise TypeError("no way")
        return plain(self, hidden)

    monkeypatch.setattr(mlp, "forward", breaking)
    with pytest.raises(ModelError, match=r"cannot be run on calibration windows: its code ends in TypeError: no way"):
        collect_statistics(model, linear_layers(model), ids)
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "forward", lambda *_: {}["nothing"])
    with pytest.raises(ModelError, match=r"cannot be run block by block: it ends in KeyError: 'nothing'"):
        find_chain(model, ids[:1, :4])


def test_weights_beyond_float32_products_name_their_layer():
    with torch.no_grad():
        weight = torch.randn(16, 24) * 1e37
    with (
        pytest.raises(NumericalError, match=r"Layer here: a factorisation failed"),
        named("here"),
    ):
        Initializer(NF4(), AlternatingLeastSquares(), 4)(weight, InputStatistics.from_inputs(torch.randn(64, 24)))


def test_a_layer_without_tokens_is_named_for_quantized_inputs(tiny_llama, ids):
    """The order of layers of a block in which none was run was a StopIteration."""
    model = load_model(str(tiny_llama)).model
    silent = {"model.layers.0.unused": Layer("model.layers.0.unused", nn.Linear(64, 64))}
    with pytest.raises(CalibrationError, match=r"1 layers received no calibration token, model\.layers\.0\.unused"):
        walked(model, silent, ids, "quantized")


def test_a_visit_that_forgets_a_layer_is_refused(tiny_llama, ids):
    """What comes after would be fitted to the model as it was."""
    model = load_model(str(tiny_llama)).model
    walk = Walk(model, linear_layers(model), CalibrationTokens.of_windows(ids), "quantized")
    with pytest.raises(ValueError, match=r"a weight for each layer of the block, got none for model\.layers\.0\."):
        walk.run(lambda _: {})
