"""An adapter as it is stored in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from torch import Tensor

from ..core.objective import Factors
from ..errors import ModelError
from ..models.files import read_json
from .lora import INNER, PREFIX, LoraScaling
from .provenance import Provenance, digest_of

SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What PEFT's configuration says of ranks and alphas."""

A, B = ".lora_A.weight", ".lora_B.weight"

VARIANTS = ("alora_invocation_tokens", "arrow_config", "use_qalora")
"""Settings of PEFT with which a LoRA adapter adds something else than `s B A` to every token."""


@final
@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The two files of an adapter.

    Attributes:
        folder: the folder that holds them.
        config: content of `adapter_config.json`.
        tensors: content of `adapter_model.safetensors`, all of them finite.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Read a folder.

        Raises:
            ModelError: if there is no adapter in it, or a file is damaged, or has NaN or infinite entries.
        """
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"Expected an adapter folder with adapter_config.json, but {folder} has none.")
        config = read_json(folder / "adapter_config.json")
        if not file.is_file():
            raise ModelError(f"Expected an adapter's tensors in {file}, and there is no such file. Let PEFT save them.")
        try:
            tensors = load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"Cannot read {file}: {error}. It is damaged; copy or save it again.") from error
        for name, tensor in tensors.items():
            if "lora_" in name and not tensor.is_floating_point():
                raise ModelError(
                    f"Expected floating-point numbers in {file}, got {tensor.dtype} in {name}. It is damaged."
                )
            bad = tensor.numel() - int(tensor.isfinite().sum()) if tensor.is_floating_point() else 0
            if bad:
                raise ModelError(
                    f"Expected finite numbers in {file}, got {bad} NaN or infinite entries of {tensor.numel()} in "
                    f"{name}. The training diverged; take an earlier checkpoint."
                )
        return cls(folder, config, tensors)

    def check_every_token(self) -> None:
        """Raise a `ModelError` unless the adapter changes the weights of its layers, for every token alike."""
        variants = [name for name in VARIANTS if self.config.get(name)]
        if variants:
            raise ModelError(
                f"Expected an adapter in {self.folder} that adds the same to every token, got one with {variants[0]}. "
                "What it adds cannot be merged or moved."
            )

    def check_plain(self) -> None:
        """Raise a `ModelError` unless the adapter is LoRA and adds exactly `s B A` in every layer."""
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise ModelError(
                f"Expected a LoRA adapter in {self.folder}, got {kind}. Only what LoRA adds can be converted."
            )
        if self.config.get("use_dora"):
            raise ModelError(
                f"Expected a plain LoRA adapter in {self.folder}, got DoRA, whose magnitudes scale the base. Train "
                "with use_dora=False to convert the result."
            )
        self.check_every_token()
        others = [name for name in self.tensors if "lora_" in name and not name.endswith((A, B))]
        if others:
            raise ModelError(
                f"Expected only lora_A.weight and lora_B.weight in {self.folder}, got {others[0]}. Adapters with more "
                "than plain LoRA cannot be converted."
            )

    @property
    def scaling(self) -> LoraScaling:
        """Ranks and alphas of the layers."""
        # Values that PEFT leaves at their defaults may be missing or null in the file.
        rank, alpha, rslora, ranks, alphas = (self.config.get(name) for name in SCALING)
        own_alphas = {key: float(value) for key, value in (alphas or {}).items()}
        return LoraScaling(int(rank or 0), float(alpha or 0), bool(rslora), ranks or {}, own_alphas)

    @property
    def stems(self) -> list[str]:
        """What stands before `.lora_A.weight` in the name of each pair of factors."""
        return sorted(key.removesuffix(A) for key in self.tensors if key.endswith(A))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items() if "lora_" in key}

    @property
    def digest(self) -> str:
        """Hash of all factors."""
        return digest_of({key: tensor for key, tensor in self.tensors.items() if key.endswith((A, B))})

    @cached_property
    def _corrected(self) -> frozenset[str]:
        # Other families have tensors of other names, each of which begins with that of its layer.
        if self.stems:
            return frozenset(stem.removeprefix(PREFIX) for stem in self.stems)
        parts = [key.removeprefix(PREFIX).split(".") for key in self.tensors]
        return frozenset(".".join(names[:end]) for names in parts for end in range(1, len(names)))

    def corrects(self, layer: str) -> bool:
        """Return whether the adapter has a correction for a layer, or for the fused parameter that an expert is in."""
        return layer in self._corrected or layer.rpartition(".")[0] in (self.config.get("target_parameters") or ())

    def depends_on(self, layer: str, provenance: Provenance) -> bool:
        """Return whether a layer of the base has to be the one that was noted, for its own correction or others."""
        return self.corrects(layer) or layer in provenance.uncorrected

    def layer(self, stem: str) -> str:
        """Return the name that ranks are looked up by: of the module, or of the parameter of an `ExpertStack`."""
        name = stem.removeprefix(PREFIX)
        module = name.replace(INNER, "")
        fused = [
            parameter
            for parameter in self.config.get("target_parameters") or []
            if parameter.rpartition(".")[0] == module
        ]
        return fused[len(fused) - 1 - name.count(INNER)] if fused else name

    def factors(self, stem: str) -> Factors:
        """Return the factors of a layer as the file holds them, float32."""
        return Factors(self.tensors[stem + B].float(), self.tensors[stem + A].float())
