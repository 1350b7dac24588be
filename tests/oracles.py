"""AutoGPTQ's own `GPTQ` class, loaded by file path: its package no longer imports with current transformers."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch

PACKAGE = "quailora_oracle_auto_gptq"


def load_auto_gptq(*, double: bool = False):
    """Return the class, or None where the wheel of auto-gptq is absent.

    With `double`, its weights and factors stay in float64: in float32 they differ from any other order of summation by
    enough to break near ties the other way.
    """
    found = importlib.util.find_spec("auto_gptq")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "quantization"
    package = f"{PACKAGE}_{double}"
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    for name in ("quantizer", "gptq"):
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        if double:
            source = source.replace("W = W.float()", "W = W.double()")
        module = types.ModuleType(f"{package}.{name}")
        module.__package__ = package
        sys.modules[module.__name__] = module
        exec(compile(source, str(folder / f"{name}.py"), "exec"), module.__dict__)
    return sys.modules[f"{package}.gptq"].GPTQ


def run_auto_gptq(cls, weight, second_moment, quantizer, monkeypatch):
    """Quantize by AutoGPTQ's class with the settings of one of ours; return the dequantized weight.

    Its scales are rounded to float16 as its format stores them, and its blocks are as long as the groups: it fits a
    group inside a longer block to weights that the block's own feedback has not reached.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=second_moment.dtype)
    layer.weight.data = weight.to(second_moment.dtype)
    run = cls(layer)
    run.quantizer.configure(quantizer.bits, perchannel=True, sym=quantizer.symmetric)
    fit = type(run.quantizer).find_params

    def find_params(self, values, weight=False):
        fit(self, values, weight)
        self.scale = self.scale.half().to(values.dtype)

    monkeypatch.setattr(type(run.quantizer), "find_params", find_params)
    run.H, run.nsamples = second_moment.clone(), 1
    run.fasterquant(
        blocksize=min(quantizer.group_size or 128, 128),
        percdamp=quantizer.damping,
        group_size=quantizer.group_size or -1,
        actorder=quantizer.activation_order,
        static_groups=quantizer.static_groups,
    )
    return layer.weight.data
