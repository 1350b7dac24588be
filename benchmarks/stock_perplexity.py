"""Perplexity of adapters on a quantized base, without quailora: by stock transformers and peft.

    python benchmarks/stock_perplexity.py BASE ADAPTER... --text wikitext2_raw_test.txt

A base in full precision is quantized to NF4 by bitsandbytes while it loads; a base in AutoGPTQ's format needs gptqmodel
and optimum, and one whose layers have different bits gptqmodel alone. `quailora evaluate` must print the same numbers.
"""

import argparse
import math
import pathlib

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@torch.inference_mode()
def perplexity(model, windows):
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def quantization_of(base):
    """Return what transformers has to be told to load a base."""
    stored = getattr(AutoConfig.from_pretrained(base), "quantization_config", None)
    if stored is None:
        return {"quantization_config": BitsAndBytesConfig(**NF4)}
    if stored["quant_method"] == "gptq":  # by a kernel that needs no compiler
        return {"quantization_config": GPTQConfig(bits=stored["bits"], backend="gptq_torch")}
    return {}


def model_of(base, dtype):
    """Return a base, loaded by transformers, or by gptqmodel if its layers have different bits."""
    stored = getattr(AutoConfig.from_pretrained(base), "quantization_config", None) or {}
    if any(key.startswith("+:") for key in stored.get("dynamic") or {}):
        from gptqmodel import GPTQModel  # takes 16 bits only

        return GPTQModel.load(base, backend="gptq_torch", dtype=torch.float16, device="cpu").model.to(dtype)
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **quantization_of(base))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="hub name or folder of a full-precision or quantized model")
    parser.add_argument("adapter", nargs="*", help="folders of adapters")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    text = pathlib.Path(options.text).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: options.windows * 2048].view(-1, 2048)
    for adapter in [None, *options.adapter]:
        dtype = getattr(torch, options.dtype)
        model = model_of(options.base, dtype)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        print(f"{adapter or 'base'}: {perplexity(model.eval(), windows):.4f}", flush=True)


if __name__ == "__main__":
    main()
