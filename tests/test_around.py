"""Bases whose norms and biases are others than those of the full-precision model."""

from __future__ import annotations

import pytest
import torch
from families import save_llama
from helpers import evaluate, init
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quailora import StoredBase, Uniform
from quailora.bases.around import check_around
from quailora.errors import ModelError
from quailora.models.load import load_model

RUN = {"rank": 4, "samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, and the same model with scales between norms and layers, which AutoAWQ moves there, as a base."""
    place = tmp_path_factory.mktemp("around")
    save_llama(place / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            scales = torch.exp(0.5 * torch.randn(64, generator=generator))
            block.input_layernorm.weight /= scales
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(block.self_attn, name).weight *= scales
    model.save_pretrained(place / "scaled")
    tokenizer.save_pretrained(place / "scaled")
    ids = torch.arange(32)[None]
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    for name in ("scaled", "model"):
        init(
            str(place / name),
            out=str(place / f"{name}-made"),
            quantizer=Uniform(4, 32),
            base_format="awq",
            save_base=True,
            **RUN,
        )
    return place


def test_a_base_with_other_norms_is_refused(place, tmp_path):
    """Its layers are others too, so that errors and perplexities would be those of no model at all."""
    base = str(place / "scaled-made/base")
    expected = r"model\.layers\.0\.input_layernorm\.weight of .* is another one .* as AutoAWQ does"
    with pytest.raises(ModelError, match=expected):
        init(str(place / "model"), out=str(tmp_path / "a"), base=base, quantizer=None, **RUN)
    with pytest.raises(ModelError, match=expected):
        evaluate(str(place / "model"), base=base, quantizer=None)
    init(str(place / "scaled"), out=str(tmp_path / "a"), base=base, quantizer=None, **RUN)


def test_norms_in_another_dtype_are_the_same(place, tmp_path):
    folder = place / "model-made/base"
    for dtype in (torch.float16, torch.bfloat16):
        copy = tmp_path / str(dtype)
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        norms = {name: one.to(dtype) for name, one in tensors.items() if name.endswith("norm.weight")}
        assert len(norms) == 5
        save_file(tensors | norms, copy / "model.safetensors", {"format": "pt"})
        check_around(StoredBase(str(copy)), load_model(str(place / "model")).model)


def test_models_on_disk_are_compared(place, tmp_path):
    loaded = load_model(str(place / "model"), device="cpu", offload=tmp_path / "offload")
    check_around(StoredBase(str(place / "model-made/base")), loaded.model)
    with pytest.raises(ModelError, match="is another one"):
        check_around(StoredBase(str(place / "scaled-made/base")), loaded.model)
