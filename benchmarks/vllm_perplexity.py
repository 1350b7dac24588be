"""Perplexity of a quantized base, and of adapters on it, without quailora: by vLLM.

    VLLM_CPU_INT4_W4A8=0 python benchmarks/vllm_perplexity.py BASE ADAPTER... --text wikitext2_raw_test.txt

`quailora evaluate --sequence-length 512` must print the same numbers. On a CPU, vLLM rounds the inputs of 4-bit layers
to 8 bits unless that variable says otherwise.
"""

import argparse
import math
import os
import pathlib

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def perplexity(model, windows, adapter, number):
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = LoRARequest(f"adapter{number}", number, adapter) if adapter else None
    answers = model.generate([{"prompt_token_ids": ids} for ids in windows], asked, lora_request=request)
    losses = [
        -scores[token].logprob
        for answer, ids in zip(answers, windows, strict=True)
        for scores, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a quantized model")
    parser.add_argument("adapter", nargs="*", help="folders of adapters")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    text = pathlib.Path(options.text).read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(options.base)(text, verbose=False)["input_ids"]
    windows = [tokens[start : start + options.length] for start in range(0, len(tokens), options.length)]
    model = LLM(
        options.base,
        dtype=options.dtype,
        enforce_eager=True,  # which needs no compiler
        max_model_len=options.length + 1,
        max_num_seqs=1,
        enable_lora=bool(options.adapter),
        max_lora_rank=64,
    )
    for number, adapter in enumerate([None, *options.adapter]):
        print(f"{adapter or 'base'}: {perplexity(model, windows[: options.windows], adapter, number):.4f}", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of vLLM can end the process by a signal while Python takes leave
