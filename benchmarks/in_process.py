"""`quailora.initialize` on SmolLM2 in NF4: its factors against the command line's, and its time against plain passes.

    python benchmarks/in_process.py

Factors are compared for alpha = r, 2r, 4r and for rank-stabilised scaling, on the same calibration tokens. Time is that
of the whole call with the recipe "qera-exact", against a plain forward pass of the full-precision model over the same
batches, and against quantizing and solving all layers, which the same run measures layer by layer.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import quailora
from quailora import Calibration, LoraScaling
from quailora.models.locate import resolve
from quailora.support.tables import markdown_table

RANK = 16


def peft_model(name: str, alpha: int, rslora: bool):
    """Return the model in NF4 with a LoRA adapter."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=alpha, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(quantized, config)


def difference(model, adapter: Path) -> float:
    """Return the largest difference of a factor from that in a file, relative to its norm; 0 if all bits are equal."""
    stored = load_file(adapter / "adapter_model.safetensors")
    worst = 0.0
    for name, factor in model.named_parameters():
        if "lora_" in name:
            expected = stored[name.replace(".default", "")]
            worst = max(worst, ((factor - expected).norm() / expected.norm()).item())
    return worst


@torch.no_grad()
def plain_pass(model, batches) -> float:
    """Return the seconds of a forward pass over batches."""
    start = time.perf_counter()
    for batch in batches:
        model(**batch, use_cache=False)
    return time.perf_counter() - start


def main(model: str = "demo", samples: int = 16, sequence_length: int = 1024) -> None:
    """Compare factors and time.

    Args:
        model: hub name or folder.
        samples: calibration windows.
        sequence_length: tokens in a window.
    """
    name = resolve(model)
    calibration = Calibration(samples=samples, sequence_length=sequence_length)
    windows = calibration.windows(AutoTokenizer.from_pretrained(name))
    batches = [{"input_ids": part} for part in windows.split(4)]
    rows = []
    for alpha, rslora in ((RANK, False), (2 * RANK, False), (4 * RANK, False), (RANK, True)):
        scaling = LoraScaling(RANK, alpha, rslora)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "adapter"
            quailora.initialize_model(model, "qera-exact", calibration, scaling=scaling, out=out)
            wrapped = peft_model(name, alpha, rslora)
            start = time.perf_counter()
            report = quailora.initialize(wrapped, batches, weights=name, recipe="qera-exact")
            took = time.perf_counter() - start
            apart = difference(wrapped, out)
        solving = sum(layer["seconds"] for layer in report["layers"])
        rows.append([f"{alpha}", str(rslora), f"{apart:.1e}", f"{took:.1f}", f"{solving:.1f}"])
    full = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    plain = min(plain_pass(full, batches) for _ in range(2))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {samples} x {sequence_length} tokens")
    print(f"A plain forward pass in float32 takes {plain:.1f} s.\n")
    print(markdown_table(["lora_alpha", "rslora", "largest difference", "initialize, s", "of it solving, s"], rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
