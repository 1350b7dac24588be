"""A small random model of each family: one row a family, and nothing else to add for a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"]  # masks and positions differ by block

# Class prefix in transformers, and what makes it small. What is special stands beside it.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED,
    "OPT": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},  # linear layers outside the blocks
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},  # fused query_key_value, ALiBi
    "GPTNeoX": {**_SMALL, "intermediate_size": 48},  # the paper's Pythia; parallel attention
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},  # Conv1D
    "Mistral": {**_GROUPED, "sliding_window": 16},
    "Qwen3": {**_GROUPED, "head_dim": 8},
    "Gemma3": {**_GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": _MIXED},
    "Phi3": _GROUPED,  # fused qkv_proj and gate_up_proj
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},  # multi-query
    "Mixtral": {**_GROUPED, "num_local_experts": 4},  # fused experts
    "Qwen3Moe": {**_GROUPED, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}

_CLASSES = {"GPT2": ("GPT2Config", "GPT2LMHeadModel"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def save_llama(folder: Path, tokenizer: Any, **options: Any) -> Path:
    """Save a random Llama of two blocks with its tokenizer; return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes | options, vocab_size=len(tokenizer), max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_special_tokens(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer that adds <bos> and <eos> by itself, as in `<bos> $A`; their ids are 300 and 301.

    It has no `bos_token`: what counts is what a tokenizer does.
    """
    import copy

    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<bos>", "<eos>"], special_tokens=True)
    pairs = [(name, changed.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    return changed


def make_model(family: str) -> Any:
    """Return the random model of a family, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    config_class, model_class = _CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(transformers, config_class)(
        **FAMILIES[family], vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():  # wide enough that activations differ from token to token in every layer
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
