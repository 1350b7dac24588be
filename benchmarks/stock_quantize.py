"""Quantize a model by gptqmodel, without quailora: the base of another tool, to take with `quailora init --base`.

    python benchmarks/stock_quantize.py MODEL OUT --text wikitext2_valid.txt

Runs in the environment that `make stock` sets up.
"""

import argparse
import pathlib
import random

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a full-precision model")
    parser.add_argument("out", help="folder to write the base to")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of windows")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = pathlib.Path(options.text).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = random.Random(options.seed).sample(range(len(tokens) // 512), options.samples)
    windows = [tokens[512 * start : 512 * start + 512][None] for start in starts]
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(options.model, config)
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows], batch_size=4)
    model.save(options.out)


if __name__ == "__main__":
    main()
