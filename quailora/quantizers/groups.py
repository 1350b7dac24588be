"""Groups of columns that share a scale."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ..errors import ConfigurationError


def consecutive_groups(columns: int, group_size: int, device: torch.device) -> Int[Tensor, " columns"]:
    """Return the group of each column where groups are runs of `group_size` columns; the last may be shorter."""
    return torch.arange(columns, device=device) // group_size


def split_groups(
    weight: Shaped[Tensor, "out_features in_features"], group_size: int
) -> Shaped[Tensor, "out_features groups group"]:
    """Reshape to groups of columns; a short last group is filled with zeros, which a range with zero ignores."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size))
    return padded.view(len(weight), -1, group_size)


def join_groups(
    weight: Shaped[Tensor, "out_features groups group"], columns: int
) -> Shaped[Tensor, "out_features in_features"]:
    """Undo `split_groups`."""
    return weight.flatten(1)[:, :columns]


def over_columns(
    groups: Shaped[Tensor, "out_features groups"], group_size: int, columns: int
) -> Shaped[Tensor, "out_features in_features"]:
    """Return the number of its group for each of the columns; differentiable."""
    return groups.repeat_interleave(group_size, dim=1)[:, :columns]


def check_group_size(group_size: object) -> None:
    """Raise a `ConfigurationError` unless a group has at least one column; called when a quantizer is made."""
    if not isinstance(group_size, int) or group_size < 1:
        raise ConfigurationError(f"Expected a group size of at least 1, or none for one group a row, got {group_size}.")
