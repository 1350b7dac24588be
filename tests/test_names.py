"""Names of modules in checkpoints, which transformers may change while it loads them."""

from __future__ import annotations

import json

import pytest
import torch
from families import save_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, Gemma3Config

from quailora.bases import StoredBase
from quailora.models.layers import linear_layers
from quailora.models.load import load_model

EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, tokenizer):
    """A small Gemma 3 that sees pictures, whose modules have other names in its checkpoint."""
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    text = heads | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 64}
    tokens = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=heads | {"image_size": 28, "patch_size": 14}, **tokens)
    folder = tmp_path_factory.mktemp("gemma")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_layers_of_a_base_go_by_their_names_in_the_model(gemma, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(gemma, quantization_config=EIGHT_BIT)
    stock.save_pretrained(tmp_path)
    assert any(name.startswith("language_model.model.") for name in load_file(tmp_path / "model.safetensors"))
    base, layers = StoredBase(str(tmp_path)), linear_layers(load_model(str(gemma)).model)
    quantized = {name for name in layers if "SCB" in stock.get_submodule(name).state_dict()}
    assert len(quantized) >= 14
    assert base.layers == quantized
    for name in quantized:
        state = stock.get_submodule(name).state_dict()
        expected = state["weight"].float() * state["SCB"][:, None] / 127
        torch.testing.assert_close(base.weight(name, torch.float32).dequantize(), expected)


def test_layers_of_a_model_that_transformers_does_not_have_keep_their_names(tiny_llama, tmp_path):
    """No code of the model is run to find them."""
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=EIGHT_BIT).save_pretrained(tmp_path)
    expected = StoredBase(str(tmp_path)).layers
    assert len(expected) == 14
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    own = {"model_type": "own_model", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit", encoding="utf-8")
    assert StoredBase(str(tmp_path)).layers == expected


def test_weights_of_the_body_alone_are_found(tmp_path, tokenizer):
    """A checkpoint without the prefix of the body, which transformers adds."""
    folder = save_llama(tmp_path / "whole", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=EIGHT_BIT)
    stock.model.save_pretrained(tmp_path / "body")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "body" / "model.safetensors"))
    assert StoredBase(str(tmp_path / "body")).layers == set(linear_layers(load_model(str(folder)).model))
