"""Every causal language model class of the installed transformers, small and random: init, then stock PEFT.

    python -m benchmarks.family_sweep results.jsonl [--only mamba bamba]

One row a family is appended to the file, and a family that has one is not run again. Each row has an outcome:

- ok: stock PEFT loads every tensor of the adapter, and the model with it runs;
- left out: the same, for an adapter without some layers, which was said;
- refused: the run ended in one line;
- not built: the configuration cannot be made small in the general way, which says nothing about quailora;
- TRACEBACK, PARTIAL, WRONG: faults. The run ended in another exception; PEFT dropped tensors, or the model with the
  adapter does not run; or statistics block by block are not those of the whole model, or a layer is called that was
  left out because text never reaches it.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from quailora import Calibration, LoraScaling, QuailoraError, initialize_model
from quailora.calibration.blocks import WholeModel
from quailora.calibration.capture import captured
from quailora.calibration.empty_pass import find_reach
from quailora.calibration.text import shipped_text
from quailora.calibration.walk import Walk, collect_statistics
from quailora.models.layers import linear_layers
from quailora.models.load import empty_model, load_model

SECONDS = 240
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 256, "n_ctx": 256, "n_inner": 96, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "ffn_dim": 96, "word_embed_proj_dim": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "state_size": 8,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 16,
    "num_blocks": 2, "attention_hidden_size": 64, "context_length": 256, "sliding_window": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "lru_width": 64, "intermediate_size_mlp": 96, "attn_layer_indices": [1],
    "first_k_dense_replace": 1, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "embedding_size": 64, "image_size": 28,
    "patch_size": 14, "max_seq_len": 256, "n_heads": 4, "n_layers": 2, "rotary_dim": 8, "mamba_d_ssm": 128,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts_per_token": 2, "unpadded_vocab_size": 300, "emb_dim": 64, "n_words": 300, "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32, "moe_topk": 2, "block_types": ["recurrent", "attention"],
}  # fmt: skip
"""What makes a configuration small, for each field that it has; sub-configurations likewise."""

EXTRAS: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True}, "roberta": {"is_decoder": True}, "camembert": {"is_decoder": True},
    "electra": {"is_decoder": True}, "megatron-bert": {"is_decoder": True}, "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True}, "roberta-prelayernorm": {"is_decoder": True},
    "data2vec-text": {"is_decoder": True}, "ernie": {"is_decoder": True}, "rembert": {"is_decoder": True},
    "roformer": {"is_decoder": True}, "roc_bert": {"is_decoder": True}, "big_bird": {"is_decoder": True},
    "mamba2": {"num_heads": 8}, "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xlstm": {"qk_dim_factor": 1.0}, "zaya": {"num_experts_per_tok": 1}, "bailing_hybrid": {"n_group": 1},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 128, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hidden_size": 64, "attention_head_size": 16},
}  # fmt: skip
"""What has to be said beside sizes."""


class TooSlow(Exception):  # noqa: N818 # not a fault
    """A family took longer than its time."""


def small_config(kind: str) -> Any:
    """Return the configuration of a family with small sizes."""
    from transformers import AutoConfig

    base = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **shrunk(base) | EXTRAS.get(kind, {}))


def shrunk(config: Any) -> dict[str, Any]:
    """Return small values for the fields that a configuration has, and for those of its sub-configurations."""
    attributes = getattr(config, "attribute_map", {})
    values = {name: SIZES[name] for name in config.to_dict() if name in SIZES and name not in attributes}
    for name, part in vars(config).items():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            values[name] = {**shrunk(part), "model_type": part.model_type}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = config.to_dict().get(name)
        if isinstance(kinds, (list, tuple)) and kinds:
            values[name] = ([*dict.fromkeys(kinds)] * 2)[:2]
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        values |= {"head_dim": values["qk_rope_head_dim"], "num_key_value_heads": values["num_attention_heads"]}
        values = {name: value for name, value in values.items() if hasattr(config, name)}
    return values


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 300 tokens, trained on the shipped text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([shipped_text("calibrate")], vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(folder)  # noqa: SLF001


def build(kind: str, folder: Path) -> Any:
    """Save the small random model of a family and return its configuration."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = small_config(kind)
    if sum(parameter.numel() for parameter in meta(config).parameters()) > 2e7:
        raise ValueError("more than 20 million parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        if not model(input_ids=torch.randint(3, 300, (1, 32))).logits.isfinite().all():
            raise ValueError("logits that are not finite")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return config


def meta(config: Any) -> Any:
    """Return the model of a configuration without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def outcome(kind: str, folder: Path) -> tuple[str, str]:
    """Return what becomes of a family, and a line about it."""
    try:
        build(kind, folder / "model")
    except TooSlow:
        raise
    except Exception as error:  # noqa: BLE001 # every class has its own reasons
        return "not built", f"{type(error).__name__}: {str(error)[:150]}"
    said = Lines()
    logging.getLogger("quailora").addHandler(said)
    try:
        calibration = Calibration(samples=2, sequence_length=32)
        initialize_model(str(folder / "model"), "quailora", calibration, scaling=LoraScaling(4), out=folder / "out")
        lost = check_in_peft(folder)
        if lost:
            return "PARTIAL", lost
        apart = check_statistics(folder)
        if apart:
            return "WRONG", apart
    except QuailoraError as error:
        return "refused", str(error)[:600]
    finally:
        logging.getLogger("quailora").removeHandler(said)
    left_out = [line for line in said.lines if line.startswith(("Leaving out", "Rank "))]
    return ("left out", " | ".join(left_out)) if left_out else ("ok", "")


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def check_in_peft(folder: Path) -> str:
    """Load the adapter on the stock model by stock PEFT; return what is wrong, or nothing."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), str(folder / "out"))
    there = {key.replace(".default", ""): value for key, value in wrapped.state_dict().items() if ".lora_" in key}
    wrote = load_file(folder / "out" / "adapter_model.safetensors")
    lost = [key for key, value in wrote.items() if key not in there or not torch.equal(there[key].float(), value)]
    if lost or len(there) != len(wrote):
        return f"{len(lost)} of {len(wrote)} tensors are not in the loaded model, which has {len(there)}: {lost[:1]}"
    with torch.no_grad():
        logits = wrapped(input_ids=torch.randint(3, 300, (1, 24))).logits
    return "" if logits.isfinite().all() else "logits that are not finite"


def check_statistics(folder: Path) -> str:
    """Compare statistics block by block with those of the whole model; return what is wrong, or nothing."""
    model = load_model(str(folder / "model")).model
    reach, ids = find_reach(empty_model(str(folder / "model"))), torch.randint(3, 300, (2, 32))
    layers, idle = reach.watched(linear_layers(model)), reach.idle(linear_layers(model))
    with torch.no_grad(), captured(idle) as called:
        model(input_ids=ids)
    if called or not reach.known:
        return (
            f"{len(called)} of {len(idle)} layers are called that count as silent: {list(called)[:3]}, {reach.known=}"
        )
    blockwise = collect_statistics(model, layers, ids, "model")
    chain = Walk._chain  # noqa: SLF001
    Walk._chain = lambda self: WholeModel(self.model)  # type: ignore[method-assign] # noqa: SLF001
    try:
        whole = collect_statistics(model, layers, ids, "model")
    finally:
        Walk._chain = chain  # type: ignore[method-assign] # noqa: SLF001
    for name in layers:
        expected, found = whole[name].second_moment, blockwise[name].second_moment
        if not (found - expected).norm() <= 1e-4 * expected.norm():
            return f"{name}: {(found - expected).norm() / expected.norm():.1e} from the statistics of the whole model"
    return ""


def sweep(results: Path, only: list[str]) -> list[dict[str, Any]]:
    """Run every family that has no row yet; return all rows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging as transformers_logging

    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {row["family"] for row in rows}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, too_slow)
    for kind in only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if kind in done:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            signal.alarm(SECONDS)
            try:
                result, line = outcome(kind, Path(folder))
            except TooSlow:
                result, line = "too slow", f"more than {SECONDS} s"
            except Exception as error:  # noqa: BLE001 # what the sweep looks for
                where = traceback.format_exc(limit=-3).replace("\n", " ")
                result, line = "TRACEBACK", f"{type(error).__name__}: {str(error)[:200]} at {where[-500:]}"
            finally:
                signal.alarm(0)
        rows.append({"family": kind, "outcome": result, "line": line, "seconds": round(time.perf_counter() - start, 1)})
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{kind:28} {result:10} {line[:150]}", flush=True)
    return rows


def too_slow(*_: object) -> None:
    """Raise `TooSlow`."""
    raise TooSlow


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("results", type=Path, help="file of rows, one a family; it is continued")
    parser.add_argument("--only", nargs="+", default=[], help="families")
    arguments = parser.parse_args()
    rows = sweep(arguments.results, arguments.only)
    for result, count in Counter(row["outcome"] for row in rows).most_common():
        print(f"{result:12} {count:4}")


if __name__ == "__main__":
    main()
