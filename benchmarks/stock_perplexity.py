"""Perplexity of an adapter on the stock 4-bit base, without quailora: torch, transformers, peft and bitsandbytes only.

    python benchmarks/stock_perplexity.py BASE ADAPTER... --text wikitext2_raw_test.txt

`quailora evaluate` must print the same numbers.
"""

import argparse
import math
import pathlib

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


@torch.inference_mode()
def perplexity(model, windows):
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="hub name or folder of the full-precision model")
    parser.add_argument("adapter", nargs="*", help="folders of adapters")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    text = pathlib.Path(options.text).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: options.windows * 2048].view(-1, 2048)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for adapter in [None, *options.adapter]:
        model = AutoModelForCausalLM.from_pretrained(
            options.base, quantization_config=quantization, dtype=getattr(torch, options.dtype)
        )
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        print(f"{adapter or 'nf4'}: {perplexity(model.eval(), windows):.4f}", flush=True)


if __name__ == "__main__":
    main()
