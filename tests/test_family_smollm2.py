"""Every family on all layers of the real model, in files that stock PEFT loads: half an hour, so marked slow."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quailora import FAMILIES, NF4, Calibration, Int8, LoraScaling, initialize_model
from quailora.comparison.sizes import of_size
from quailora.evaluation.scores import Corrected, biases_of
from quailora.models.layers import linear_layers
from quailora.models.load import load_model
from quailora.models.locate import resolve
from quailora.models.weights import biased, replaced

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(1000, 1256).view(2, 128)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_peft_computes_what_was_fitted(tmp_path, name, base):
    """Logits on a base of bitsandbytes, as large as LoRA of rank 16, against the model with weights `Q + C`."""
    if base not in FAMILIES[name].bases:
        pytest.skip(f"stock PEFT does not compute {name} on {base}")
    quantizer = NF4() if base == "nf4" else Int8()
    plain = load_model("demo", "float32", "cpu").model
    layers = {layer: each for layer, each in linear_layers(plain).items() if layer != "lm_head"}
    sized = of_size(FAMILIES[name](), 16, layers, "numbers")
    result = initialize_model(
        "demo",
        "qera-exact",
        Calibration(samples=4, sequence_length=512),
        family=sized.family,
        scaling=None if sized.family.default_rank is None else LoraScaling(sized.rank),
        base=quantizer,
        out=tmp_path / "out",
    )
    assert result.corrections.keys() == layers.keys()
    for layer in result.report["layers"]:
        assert layer["error"] <= layer["error_uncalibrated"] * (1 + 1e-5) <= layer["error_none"] * (1 + 1e-4)
    config = BitsAndBytesConfig(**quantizer.stock_config())
    stock = AutoModelForCausalLM.from_pretrained(resolve("demo"), quantization_config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out").train()  # in evaluation inputs are rounded, too
    quantized = {layer: quantizer.quantize(each.weight).dequantize() for layer, each in layers.items()}
    weights = Corrected(quantized, result.corrections)
    with torch.no_grad(), replaced(layers, weights), biased(layers, biases_of(weights)):
        expected = plain(IDS).logits
    with torch.no_grad():
        found = adapted(IDS).logits
    size = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * size)
