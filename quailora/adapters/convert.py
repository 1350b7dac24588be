"""What training changed, as an adapter for the full-precision model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ConfigurationError, ModelError
from ..outputs import new_folder, write_json, write_tensors
from ..report.tables import print_table
from .lora import INNER, PREFIX, LoraScaling
from .provenance import read_provenance

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_A, _B = ".lora_A.weight", ".lora_B.weight"

Pair = tuple[Tensor, Tensor]
"""`lora_A` and `lora_B` as a file holds them."""


@final
@dataclass(frozen=True)
class Conversion:
    """What `convert` returns.

    Attributes:
        out: folder of the new adapter.
        rank: its rank, where no pattern says otherwise.
        layers: pairs of factors in it.
    """

    out: Path
    rank: int
    layers: int

    def show(self) -> None:
        """Print a line."""
        rows = [["layers", str(self.layers)], ["rank", str(self.rank)]]
        print_table(f"{self.out}: for the full-precision model", ("what", "number"), rows)


@final
@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The two files of an adapter.

    Attributes:
        folder: where they are.
        config: content of `adapter_config.json`.
        tensors: content of `adapter_model.safetensors`.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Read a folder.

        Raises:
            ModelError: if there is no LoRA adapter in it, or a file is damaged.
        """
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"Expected an adapter's configuration and tensors in {folder}: {error}") from error
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise ModelError(f"Expected a plain LoRA adapter in {folder}, got {config.get('peft_type')}.")
        return cls(folder, config, tensors)

    @property
    def scaling(self) -> LoraScaling:
        """Ranks and alphas."""
        rank, alpha, rslora, ranks, alphas = (self.config.get(name) for name in _SCALING)
        own = {key: float(value) for key, value in (alphas or {}).items()}
        return LoraScaling(int(rank or 0), float(alpha or 0), bool(rslora), ranks or {}, own)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items() if "lora_" in key}

    def layer(self, stem: str) -> str:
        """Return the name that ranks are looked up by: of the module, or of the parameter of an `ExpertStack`."""
        name = stem.removeprefix(PREFIX)
        module = name.replace(INNER, "")
        fused = [each for each in self.config.get("target_parameters") or [] if each.rpartition(".")[0] == module]
        return fused[len(fused) - 1 - name.count(INNER)] if fused else name

    def pair(self, stem: str) -> Pair:
        """Return the factors of a layer, float32."""
        return self.tensors[stem + _A].float(), self.tensors[stem + _B].float()


def convert(adapter: str, *, initial: str, out: str, model: str | None = None, overwrite: bool = False) -> Conversion:
    """Write what training changed as an adapter for the full-precision model.

    An adapter of `init` makes up for the error of one quantized base. On the full-precision model it would *add* that
    error, so it must not be merged there. What training changed can go there: `s (B A - B0 A0)`, exactly, as an adapter
    of twice the rank, which PEFT loads and merges.

    Args:
        adapter: folder of the trained adapter, as PEFT saved it.
        initial: folder that `init` wrote, from which the training started.
        out: folder for the new adapter.
        model: the full-precision model, as the new adapter shall name it; by default what `init` was given.
        overwrite: replace a result that is in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    trained, before = SavedAdapter.read(Path(adapter).expanduser()), SavedAdapter.read(Path(initial).expanduser())
    check_pair(trained, before)
    scaling = before.scaling
    doubled = double_rank(scaling)
    stems = sorted(key.removesuffix(_A) for key in before.tensors if key.endswith(_A))
    tensors = {key: tensor for key, tensor in trained.tensors.items() if key not in before.tensors}
    for stem in stems:
        rank = scaling.rank_of(before.layer(stem))
        tensors[stem + _A], tensors[stem + _B] = change(trained.pair(stem), before.pair(stem), rank)
    config = dict(trained.config) | doubled.as_config()
    config |= {
        "base_model_name_or_path": model or original_model(before),
        "init_lora_weights": True,
    }
    with new_folder(Path(out).expanduser(), overwrite) as folder:
        write_json(folder / "adapter_config.json", config)
        write_tensors(folder / "adapter_model.safetensors", tensors)
    return Conversion(Path(out), doubled.rank, len(stems))


def check_pair(trained: SavedAdapter, before: SavedAdapter) -> None:
    """Raise a `ConfigurationError` unless training can have started from the other adapter."""
    told = [
        f"{name} is {trained.config.get(name)!r} in one and {before.config.get(name)!r} in the other"
        for name in _SCALING
        if (trained.config.get(name) or None) != (before.config.get(name) or None)
    ]
    if not told and trained.shapes != before.shapes:
        told = ["their layers or shapes differ"]
    if told:
        raise ConfigurationError(
            f"{trained.folder} was not trained from {before.folder}: {'; '.join(told)}. Pass the folder that init "
            "wrote as --initial."
        )


def change(trained: Pair, before: Pair, rank: int) -> Pair:
    """Return factors of twice the rank whose product is `B A - B0 A0`.

    A parameter of fused experts has one pair for all of them: `lora_A` expert after expert, `lora_B` interleaved.

    Args:
        trained: `A` and `B`.
        before: `A0` and `B0`.
        rank: of both.
    """
    experts = len(trained[0]) // rank
    stacked = [pair[0].reshape(experts, rank, -1) for pair in (trained, before)]
    interleaved = [pair[1].reshape(-1, rank, experts) for pair in (trained, before)]
    lora_A, lora_B = torch.cat(stacked, 1), torch.cat([interleaved[0], -interleaved[1]], 1)
    return lora_A.flatten(0, 1).contiguous(), lora_B.flatten(1).contiguous()


def double_rank(scaling: LoraScaling) -> LoraScaling:
    """Return the scaling with twice the ranks and the same factor `s` in every layer."""
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
    provenance = read_provenance(before.folder)
    if not provenance:
        raise ConfigurationError(
            f"{before.folder} has no quailora.json, so name the full-precision model with --model."
        )
    name: str = provenance["base_model"]
    return name
