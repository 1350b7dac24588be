"""Make an adapter for the full-precision model of what training has changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..core.objective import Factors
from ..errors import ConfigurationError
from ..support.files import StrPath, as_str, check_writable, folder_of, new_folder, write_json, write_tensors
from ..support.inputs import check_inputs
from ..support.tables import print_table
from .convert_linear import is_plain_lora, linear_change
from .given import AdapterGiven, given_folder
from .lora import LoraScaling
from .pairs import check_pair, check_started_from, check_without_earlier, initial_of
from .provenance import read_provenance
from .saved import A, B, SavedAdapter


@final
@dataclass(frozen=True)
class Conversion:
    """What `convert` returns.

    Attributes:
        out: folder of the new adapter.
        rank: rank of its layers, except for those that a pattern names; 0 for families other than LoRA.
        layers: number of pairs of factors in it, or of its tensors for families other than LoRA.
    """

    out: Path
    rank: int
    layers: int

    def show(self) -> None:
        """Print a line."""
        rows = (
            [["layers", str(self.layers)], ["rank", str(self.rank)]] if self.rank else [["tensors", str(self.layers)]]
        )
        print_table(f"{self.out}: for the full-precision model", ("what", "number"), rows)


def convert(
    adapter: AdapterGiven,
    *,
    out: StrPath,
    initial: StrPath | None = None,
    model: StrPath | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write what training changed as an adapter for the full-precision model.

    An adapter of `init` makes up for the error of one quantized base. On the full-precision model it would *add* that
    error, so it must not be merged there. What training changed can go there: `s (B A - B0 A0)`, exactly, as an adapter
    of twice the rank, which PEFT loads and merges. Of families whose change is linear in their tensors (SHiRA, MiSS,
    C3A, FourierFT, WaveFT, BEFT) it is an adapter of the same size.

    Args:
        adapter: hub name or folder of the trained adapter, as PEFT saved it, or the `PeftModel` that was trained.
        out: folder for the new adapter.
        initial: folder that `init` wrote, from which the training started; it is looked for around the trained adapter
            if None, by the hash that training keeps.
        model: the full-precision model, as the new adapter shall name it; by default what `init` was given.
        overwrite: replace a result that is in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    trained = SavedAdapter.read(given_folder(adapter))
    before = initial_of(trained, initial)
    if before is None:
        raise ConfigurationError(
            f"{trained.folder} added nothing before its training, so it can be used on the full-precision model as it "
            "is. To have the merged model, convert with `merge=True`, or call quailora.merge_full."
        )
    check_without_earlier(before)
    if is_plain_lora(before):
        tensors, sizes = doubled_lora(trained, before)
    else:
        tensors, sizes = linear_change(trained, before), {}
    # The start of the new adapter is its content, so PEFT is told not to initialize it by any method of its own.
    config = dict(trained.config) | sizes
    config |= {
        "base_model_name_or_path": as_str(model) or original_model(before),
        "auto_mapping": None,  # where the origin stood: this adapter has another base
    }
    target = folder_of(out)
    check_writable(target)
    check_inputs(target, [trained.folder, before.folder, initial, model])
    with new_folder(target, overwrite) as folder:
        write_json(folder / "adapter_config.json", config)
        write_tensors(folder / "adapter_model.safetensors", tensors)
    return Conversion(target, int(sizes.get("r", 0)), len(before.stems) or len(before.tensors))


def doubled_lora(trained: SavedAdapter, before: SavedAdapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an adapter of twice the rank that adds what training has changed, and its configuration.

    Raises:
        ModelError: if an adapter is not plain LoRA.
        ConfigurationError: if training did not start from the other adapter, as far as the files tell.
    """
    for saved in (trained, before):
        saved.check_plain()
    check_pair(trained, before)
    check_started_from(trained, before)
    scaling = before.scaling
    tensors = {key: tensor for key, tensor in trained.tensors.items() if not key.endswith((A, B))}  # whole modules
    for stem in before.stems:
        rank = scaling.rank_of(before.layer(stem))
        tensors[stem + B], tensors[stem + A] = change(trained.factors(stem), before.factors(stem), rank)
    return tensors, double_rank(scaling).as_config() | {"init_lora_weights": True}


def change(trained: Factors, before: Factors, rank: int) -> Factors:
    """Return factors of twice the rank whose product is `B A - B0 A0`.

    A parameter of fused experts has one pair for all of them: `lora_A` expert after expert, `lora_B` interleaved.

    Args:
        trained: the factors `B` and `A` after training.
        before: the factors `B0` and `A0` before training.
        rank: rank of both adapters.
    """
    # B A - B0 A0 = [B, -B0] [A; A0], of rank 2 r. In a parameter of fused experts this holds for each expert, so that
    # the factors of both are put together expert by expert: dimension 1 of both views counts the rank of one expert.
    experts = len(trained.lora_A) // rank
    stacked = [pair.lora_A.reshape(experts, rank, -1) for pair in (trained, before)]
    interleaved = [pair.lora_B.reshape(-1, rank, experts) for pair in (trained, before)]
    lora_A, lora_B = torch.cat(stacked, 1), torch.cat([interleaved[0], -interleaved[1]], 1)
    return Factors(lora_B.flatten(1).contiguous(), lora_A.flatten(0, 1).contiguous())


def double_rank(scaling: LoraScaling) -> LoraScaling:
    """Return the scaling with twice the ranks and the same factor `s` in every layer."""
    # s = alpha / r, or alpha / sqrt(r) with rslora: twice the rank needs twice, or sqrt(2) times, the alpha.
    factor = math.sqrt(2) if scaling.rslora else 2
    return replace(
        scaling,
        rank=2 * scaling.rank,
        alpha=factor * scaling.default_alpha,
        rank_pattern={key: 2 * rank for key, rank in scaling.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in scaling.alpha_pattern.items()},
    )


def original_model(before: SavedAdapter) -> str:
    """Return the full-precision model that an adapter was made from.

    Raises:
        ConfigurationError: if nothing says so.
    """
    origin = read_provenance(before.folder).origin
    if origin is None:
        raise ConfigurationError(
            f"{before.folder} does not say which full-precision model it was made from, so name it with `model`."
        )
    return origin.model
