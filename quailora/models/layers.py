"""The weight matrices of a Hugging Face model: how to list them, select them by targets, and read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ModelError, TargetError

ALL_LINEAR = "all-linear"
EXPERTS = "experts"


@final
@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix: that of a linear layer, or one expert's in a fused parameter of a mixture of experts.

    Attributes:
        name: module name; for an expert the parameter's name and its number: `model.layers.0.mlp.experts.down_proj.3`.
        module: the module that holds the weight.
        parameter: the attribute that holds it.
        expert: index into a fused parameter (experts first); None for a linear layer.
        transposed: whether the weight is stored as (in_features, out_features).
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The weight as (out_features, in_features); a view, where it is stored otherwise.

        Raises:
            ModelError: if it is not a floating-point matrix.
        """
        weight: Tensor = getattr(self.module, self.parameter).detach()
        if self.expert is not None:
            weight = weight[self.expert]
        if not weight.is_floating_point() or weight.ndim != 2:
            raise ModelError(
                f"Expected a floating-point weight in {self.name}, got {weight.dtype}. "
                "Load the model in full precision; quailora quantizes it."
            )
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, known also while the weight itself is on disk."""
        rows, columns = getattr(self.module, self.parameter).shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def group(self) -> str:
        """The name without the expert's number: of the module, or of the parameter that all experts share."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]


def linear_layers(model: Any) -> dict[str, Layer]:
    """Return every linear layer of a model, by module name, in the order of the model.

    These are `torch.nn.Linear` and GPT-2's `Conv1D`, but not the output head, nor what a model keeps in float32,
    nor what is inside a layer of PEFT.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    # The same rules by which transformers itself decides what to quantize, so that an adapter for "all linear layers"
    # is one for the layers that stock code quantizes.
    excluded = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # noqa: SLF001
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    return {
        name: Layer(name, module, transposed=isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and should_convert_module(name, excluded)
        and not name.startswith(wrapped)
    }


def stock_quantizes(layer: Layer) -> bool:
    """Return whether stock transformers quantizes a layer while it loads a model: no experts, no derived classes."""
    from transformers.pytorch_utils import Conv1D

    return layer.expert is None and type(layer.module) in (nn.Linear, Conv1D)


def output_head(model: Any) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, if the model says which it is."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head


def expert_layers(model: Any) -> dict[str, Layer]:
    """Return every expert's matrices in fused (three-dimensional) parameters, by name, in the order of the model.

    Stock transformers leaves them in full precision when it quantizes a model.
    """
    # A fused parameter is told by its three dimensions. Convolutions have three, too, and are something else.
    experts = {}
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        transposed = bool(getattr(module, "is_transposed", False))  # how transformers and PEFT mark (in, out) experts
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and value.is_floating_point():
                for expert in range(len(value)):
                    name = f"{module_name}.{parameter}.{expert}"
                    experts[name] = Layer(name, module, parameter, expert, transposed)
    return experts


def all_layers(model: Any) -> dict[str, Layer]:
    """Return linear layers and experts, in the order of the model."""
    order = {module: index for index, module in enumerate(model.modules())}
    layers = {**linear_layers(model), **expert_layers(model)}
    return dict(sorted(layers.items(), key=lambda item: order[item[1].module]))


def base_layers(model: Any, chosen: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers that the base quantizes: all linear layers, and all experts if some experts were chosen."""
    with_experts = any(layer.expert is not None for layer in chosen.values())
    return all_layers(model) if with_experts else linear_layers(model)


def select_layers(model: Any, targets: Sequence[str] = (ALL_LINEAR,)) -> dict[str, Layer]:
    """Return the layers that carry an adapter.

    Args:
        model: the model.
        targets: `all-linear`, `experts`, or names, their endings (`q_proj`, `mlp.down_proj`) or regular expressions
            that match a whole name; a layer is meant if any of them matches. An expert goes by the name of the
            parameter that holds all of them.

    Raises:
        TargetError: if a target matches nothing, or there is none.
    """
    if not targets:
        raise TargetError("Expected at least one target, got none. Name layers, or leave `targets` out for all-linear.")
    layers = all_layers(model)
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = {name for name, layer in layers.items() if is_meant(layer, target)}
        if not matches:
            raise no_match(model, layers, target)
        chosen |= matches
    return {name: layer for name, layer in layers.items() if name in chosen}


def no_match(model: Any, layers: Mapping[str, Layer], target: str) -> TargetError:
    """Return the error for a target that means no layer that can be quantized."""
    endings = ", ".join(sorted({ending(layer.group) for layer in layers.values()}))
    others = [name for name, _ in model.named_modules() if name and matches_target(name, target)]
    head = output_head(model)
    if any(module is head for name, module in model.named_modules() if name in others):
        reason = "is the output head, which is never quantized, so there is nothing to correct"
    elif others:
        reason = f"means {others[0]}, which is no linear layer that transformers quantizes"
    else:
        reason = f"matches no {'fused experts' if target == EXPERTS else 'linear layer'}"
    return TargetError(f"The target {target!r} {reason}. Layers of this model end in: {endings}.")


def named_layers(layers: Mapping[str, Layer], targets: Sequence[str]) -> set[str]:
    """Return the layers that a target means by name, beside those that `all-linear` and `experts` mean by kind."""
    names = [target for target in targets if target not in (ALL_LINEAR, EXPERTS)]
    return {name for name, layer in layers.items() if any(is_meant(layer, target) for target in names)}


def is_meant(layer: Layer, target: str) -> bool:
    """Return whether a target means a layer."""
    if target in (ALL_LINEAR, EXPERTS):
        return (layer.expert is not None) == (target == EXPERTS)
    return matches_target(layer.group, target)


def matches_target(name: str, target: str) -> bool:
    """Return whether a target is the name, its ending at a dot, or a regular expression for the whole name."""
    # As PEFT reads `target_modules`: a list of endings, or a regular expression for whole names.
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise TargetError(
            f"The target {target!r} is neither a module name nor a regular expression: {error}."
        ) from error


def explicit_targets(model: Any, chosen: Mapping[str, Layer]) -> list[str]:
    """Return the shortest list of PEFT `target_modules` that means exactly the linear layers among these.

    That is their endings, if no other module of the model shares one; their full names otherwise.
    """
    # PEFT takes a target for the ending of a name. Endings are short and survive a change of prefix, but they also mean
    # every other module that ends alike: one more, and the full names are the only list that is exact.
    linear = [name for name, layer in chosen.items() if layer.expert is None]
    endings = {ending(name) for name in linear}
    every = dict(model.named_modules())
    meant = {name for name in every if ending(name) in endings}
    return sorted(endings) if meant == set(linear) else linear


def block_of(name: str) -> str:
    """Return the part of a layer's name up to the number of its block, or nothing for one outside all blocks."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def largest_block(sizes: Mapping[str, int]) -> int:
    """Return the sum of sizes in the block where it is largest; what is outside all blocks stands for itself.

    Args:
        sizes: of layers or parameters, by name.
    """
    blocks: dict[str, int] = {}
    for name, one in sizes.items():
        place = block_of(name) or name
        blocks[place] = blocks.get(place, 0) + one
    return max(blocks.values())


def ending(name: str) -> str:
    """Return the last part of a name."""
    return name.rpartition(".")[2]


def kind(name: str) -> str:
    """Return what a layer is in its block: the last part of its name, or of its parameter's name for an expert."""
    return ending(re.sub(r"\.\d+$", "", name))
