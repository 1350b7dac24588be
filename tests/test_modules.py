"""Modules that are trained whole beside an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import init
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quailora.adapters.convert import convert
from quailora.errors import TargetError

FAST = {"rank": 4, "samples": 2, "sequence_length": 32}


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    from families import save_llama

    return save_llama(tmp_path_factory.mktemp("untied"), tokenizer, num_key_value_heads=2)


@pytest.mark.parametrize("offload", ["always", "never"])
def test_stock_peft_trains_them_from_the_base_weights(untied, tmp_path, offload, generator):
    """Logits are those of the adapter alone; the modules are in the file, trainable, and saved after training."""
    names = ["embed_tokens", "lm_head"]
    init(str(untied), out=str(tmp_path / "a"), modules_to_save=names, offload=offload, **FAST)
    init(str(untied), out=str(tmp_path / "plain"), **FAST)
    ids = torch.randint(3, 300, (2, 24), generator=generator)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), str(tmp_path / "plain"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(untied), str(tmp_path / "a"), is_trainable=True
    )
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    assert sum("modules_to_save" in name for name in trainable) == 2
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name in trainable:
                each.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    convert(str(tmp_path / "trained"), initial=str(tmp_path / "a"), out=str(tmp_path / "change"))
    converted = load_file(tmp_path / "change" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{name}.weight"
        torch.testing.assert_close(converted[key], kept[key], rtol=0, atol=0)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), str(tmp_path / "change"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["embeddings"], "'embeddings' in modules_to_save means no module. Modules end in: .*embed_tokens"),
        (["q_proj"], "q_proj is to get an adapter. Leave it out of modules_to_save"),
        (["mlp"], "but model.layers.0.mlp holds others"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(untied, tmp_path, names, message):
    with pytest.raises(TargetError, match=message):
        init(str(untied), out=str(tmp_path / "a"), modules_to_save=names, dry_run=True, **FAST)


def test_none_leave_no_trace(untied, tmp_path):
    init(str(untied), out=str(tmp_path / "a"), **FAST)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] is None
