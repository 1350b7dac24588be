"""What the model card and the sidecar say of how an adapter was made."""

from __future__ import annotations

import ast
import json
from dataclasses import replace

import pytest
import yaml
from helpers import init

from quailora import NF4, Initializer, Optimal, Uniform
from quailora.adapters.lora import LoraScaling
from quailora.layer.record import LayerRecord
from quailora.methods.block_training import BlockTraining
from quailora.methods.distillation import Distillation
from quailora.methods.method import Method
from quailora.methods.recipes import RECIPES
from quailora.pipeline.card import model_card

RECORD = LayerRecord("model.layers.0.mlp.up_proj", (8, 8), 2, 4.1, 64, 2.0, 1.5, 1.0, 0.9, 0.1, 0)


def card(name, quantizer=NF4(), **options):  # noqa: B008 # frozen
    parts = {key: options.pop(key) for key in ("distillation", "recipe", "blocks") if key in options}
    method = Method(Initializer(quantizer, Optimal()), LoraScaling(16), **parts)
    return model_card(method, [RECORD], model=name, base_model=name, calibration_tokens=64, **options)


@pytest.mark.parametrize("name", ["plain", "it's", 'say "x": {y}', "a\\b", "a: b # c", "x\ny", "ü", "long" * 60, "no"])
@pytest.mark.parametrize("own_base", [False, True])
def test_any_name_is_quoted(name, own_base):
    """In the front matter, and in the code that loads the base."""
    text = card(name, Uniform() if own_base else NF4(), quantized_base=name if own_base else None)
    _, front_matter, rest = text.split("---\n", 2)
    assert yaml.safe_load(front_matter)["base_model"] == name
    code = ast.parse(rest.split("```python\n")[1].split("```")[0])
    assert name in {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
    assert rest.splitlines()[1].endswith(f"quantized by {'Uniform' if own_base else 'NF4'}")


def test_training_is_told():
    assert "It has not been\ntrained." in card("m")
    assert "this adapter before its training" not in card("m")
    distilled = card("m", distillation=Distillation(steps=7), recipe="distilled")
    assert "distilled to predict what full precision does: 7 steps of 2 x 512 tokens" in distilled
    assert "by the recipe `distilled`" in distilled
    assert "calibration inputs), before the training:" in distilled
    assert "fine-tuned on the text itself" in card("m", distillation=Distillation(target="text"))
    blocks = card("m", blocks=BlockTraining(steps=7, parts=("scales", "factors")), distillation=Distillation(steps=9))
    assert "full precision (scales of the base and the adapter): 7 steps of\n1024 tokens" in blocks
    assert "9 steps of 2 x 512 tokens" in blocks


def test_a_distilled_adapter_says_so(tiny_llama, tmp_path, monkeypatch, capsys):
    row = RECIPES["distilled"]
    monkeypatch.setitem(
        RECIPES, "distilled", replace(row, distillation=replace(row.distillation, steps=2, sequence_length=32))
    )
    result = init(tiny_llama, out=tmp_path / "out", recipe="polished", rank=4, samples=4, sequence_length=32)
    result.show()
    assert "before its training" in capsys.readouterr().out
    assert "It has not been\ntrained." not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    sidecar = json.loads((tmp_path / "out" / "quailora.json").read_text(encoding="utf-8"))
    assert sidecar["recipe"] == "distilled"
    assert sidecar["inputs"] == "asymmetric"
    assert 0 < sidecar["step"] <= 1
    assert sidecar["training"]["init_args"]["steps"] == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["training"] == sidecar["training"]
