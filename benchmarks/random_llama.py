"""Write a Llama checkpoint with random weights, one block in memory at a time.

    python benchmarks/random_llama.py --out big/ --blocks 56

The defaults are TinyLlama's shapes with SmolLM2's tokenizer, 6.2 GB in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from quailora.models.locate import resolve


def main(out: str, blocks: int = 56, hidden: int = 2048, intermediate: int = 5632, heads: int = 32) -> None:
    """Write the checkpoint.

    Args:
        out: folder to write to.
        blocks: decoder blocks, of 103 MB each with the default shapes.
        hidden: width of the hidden states.
        intermediate: width inside the MLP.
        heads: attention heads.
    """
    folder = Path(out)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo"))
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    square = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    where: dict[str, str] = {}
    total = 0

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() * 2 for tensor in tensors.values())

    embeddings = {name: weight(len(tokenizer), hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write("outside.safetensors", {**embeddings, "model.norm.weight": ones})
    for index in range(blocks):
        place = f"model.layers.{index}."
        tensors = {f"{place}{name}.weight": weight(hidden, hidden) for name in square}
        tensors |= {f"{place}mlp.{name}.weight": weight(intermediate, hidden) for name in ("gate_proj", "up_proj")}
        tensors[f"{place}mlp.down_proj.weight"] = weight(hidden, intermediate)
        tensors |= {f"{place}{n}.weight": ones.clone() for n in ("input_layernorm", "post_attention_layernorm")}
        write(f"block-{index:03d}.safetensors", tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    print(f"{folder}: {total / 1e9:.2f} GB in {blocks} blocks")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
