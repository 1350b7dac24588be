"""What later layers make up for of the errors of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..models.layers import block_of, kind

_LEAST = 0.1  # share of a cost that is left at least; a cost of zero would be noise

# Layers are fitted to targets T in place of their weights W, so that they make up for the errors of earlier layers. An
# error of values, for example, is made up for by the projection that follows them, and one of `down_proj` hardly.
#
# Let a = <E, g> belong to the error of one layer, with g as in `costs.py`, and let b be the sum of <T - W, g> over the
# layers that follow. One part of b, b', is there because of E. The rest is there because of other errors, and is not
# correlated with a. E costs E(a^2) / 2 by itself, and E((a - b')^2) / 2 after later layers have made up for it. Targets
# go a share s of the way to the least-squares solution b*, for which E(a b*) = E(b*^2). So with b' = s b*
#
#     E((a - b')^2) = E(a^2) - (2 - s) E(a b)
#
# of which both terms are means over samples. E(a b) is small and noisy for one layer, so it is taken from all layers of
# a kind together, and from those that follow closely, which make up for most of what is made up for.


def later_layers(names: Sequence[str]) -> Bool[Tensor, "layers layers"]:
    """Return which layers (columns) follow each layer (rows) in its own block and the next one.

    Args:
        names: names of layers in the order of the model.
    """
    numbers: dict[str, int] = {}
    blocks = torch.tensor([numbers.setdefault(block_of(name) or name, len(numbers)) for name in names])
    places = torch.arange(len(names))
    return (places > places[:, None]) & (blocks <= blocks[:, None] + 1)


def shares_left(
    names: Sequence[str], alone: Float[Tensor, " layers"], made_up: Float[Tensor, " layers"], step: float
) -> Float[Tensor, " layers"]:
    """Return what is left of the cost of an error in each layer after later ones have made up for it, as a share.

    Layers of the same kind, such as all `v_proj`, have the same share.

    Args:
        names: names of the layers.
        alone: `E(a^2)` of each layer.
        made_up: `E(a b)` of each layer.
        step: share `s` of the way to the least-squares solution that targets go.
    """
    found = torch.ones(len(names), dtype=torch.float64)
    kinds = [kind(name) for name in names]
    for one in set(kinds):
        same = torch.tensor([other == one for other in kinds])
        cost = alone[same].sum().item()
        if cost > 0:
            found[same] = min(1.0, max(_LEAST, 1 - (2 - step) * made_up[same].sum().item() / cost))
    return found
