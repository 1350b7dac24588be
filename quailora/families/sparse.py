"""Sparse corrections: which entries they have, and their values."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.linalg import semidefinite_solve, uniform

_FIRST = 40  # the first round chooses one entry in so many
_GROWTH = 0.3  # of all entries, and of those of a row, in a round; 0.1 gains half a percent more in twice the time
_ROOM = 2  # further entries that a row may get in a round
_RIDGE = 1e-8  # of the diagonal, for entries whose inputs are copies of each other
_GROUP = 64  # rows that are solved for together, of about the same number of entries
_NUMBERS = 2**22  # in the matrices of such a group at most, which bounds the memory


def pursuit(
    target: Float[Tensor, "rows columns"], metric: Float[Tensor, "columns columns"], count: int
) -> Bool[Tensor, "rows columns"]:
    """Return where the entries of a sparse `C` with a small `tr((E - C) H (E - C)^T)` are.

    Args:
        target: `E H`.
        metric: `H`, with ones on its diagonal, or zeros.
        count: number of entries.
    """
    taken, found, slope = torch.zeros_like(target, dtype=torch.bool), 0, target
    while found < count:
        # With G = (E - C) H another entry ij gains G_ij^2 / H_jj alone. Entries of one row share much of their gains
        # where their inputs are correlated, as all are that have a mean. So the first rounds, which take such a share
        # away, take few entries, and no row gets many at once.
        room = (_ROOM + _GROWTH * taken.sum(1)).long()
        width = min(int(room.max()), target.shape[1])
        gains, columns = slope.square().masked_fill_(taken, 0).topk(width)
        gains[torch.arange(width, device=room.device) >= room[:, None]] = 0
        more = min(max(count // _FIRST, math.ceil(_GROWTH * found), 1), count - found, int(gains.count_nonzero()))
        if not more:  # nothing is left to gain
            free = (~taken).flatten().nonzero()[:, 0]
            taken.view(-1)[free[spread(count - found, len(free)).to(free.device)]] = True
            break
        best = gains.flatten().topk(more, sorted=False).indices
        taken[best // width, columns.flatten()[best]] = True
        found += more
        if found < count:
            places, values = regression(taken, target, metric)
            sparse = torch.sparse_coo_tensor(places, values, taken.shape, check_invariants=False, is_coalesced=True)
            slope = target - sparse @ metric
    return taken


def regression(
    taken: Bool[Tensor, "rows columns"], target: Float[Tensor, "rows columns"], metric: Float[Tensor, "columns columns"]
) -> tuple[Int[Tensor, "2 count"], Float[Tensor, " count"]]:
    """Return the places, row by row, and the best values of entries; see `pursuit`."""
    # Each row has equations of its own for its entries S: c_S H_SS = (E H)_S. Rows of about the same number of entries
    # are solved for together. The shorter ones are filled up with zeros, which gives them further unknowns of zero.
    places = taken.nonzero().T
    right, values = target[tuple(places)], torch.zeros_like(places[0], dtype=target.dtype)
    sizes = taken.sum(1)
    starts, order = sizes.cumsum(0) - sizes, sizes.argsort(descending=True, stable=True)
    while len(order) and (size := int(sizes[order[0]])):
        rows, order = order.tensor_split([max(1, min(_GROUP, _NUMBERS // size**2))])
        steps = torch.arange(size, device=rows.device)
        held = steps < sizes[rows, None]
        at = torch.where(held, starts[rows, None] + steps, 0)
        columns = places[1][at]
        matrices = metric.take(columns[:, :, None] * len(metric) + columns[:, None])
        matrices *= held[:, :, None] & held[:, None]
        matrices.diagonal(dim1=1, dim2=2).mul_(1 + _RIDGE)
        solved = semidefinite_solve(matrices, (right[at] * held)[..., None])[..., 0]
        values[at[held]] = solved[held]
    return places, values


def largest(matrix: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    """Return where the largest entries are."""
    best = matrix.abs().flatten().topk(count, sorted=False).indices
    return torch.zeros_like(matrix, dtype=torch.bool).flatten().index_fill(0, best, True).view_as(matrix)


def allocated(
    error: Float[Tensor, "rows columns"], scaled: Float[Tensor, "rows columns"], count: int
) -> Bool[Tensor, "rows columns"]:
    """Return entries that are shared out to rows by the norms of their errors, the largest of each row.

    Args:
        error: `E`.
        scaled: `E` with each column times the root of the power of its input.
        count: number of entries.
    """
    budgets = shared_out(error.norm(dim=1), count, error.shape[1])
    places = scaled.abs().argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(error.shape[1], device=error.device) < budgets[:, None]
    return torch.zeros_like(chosen).scatter(1, places, chosen)


def shared_out(weights: Float[Tensor, " rows"], count: int, most: int) -> Int[Tensor, " rows"]:
    """Return whole numbers in proportion to weights, none above `most`, that add up to `count`."""
    given = torch.zeros_like(weights, dtype=torch.long)
    while left := count - int(given.sum()):
        room = most - given
        shares = weights * (room > 0)
        if not shares.any():  # only rows without any error have room
            shares = (room > 0).to(weights)
        exact = left * shares / shares.sum()
        more = torch.minimum(exact.long(), room)
        if not more.any():  # less than one for each row: those with the largest shares get one
            more[exact.topk(min(left, int(shares.count_nonzero()))).indices] = 1
        given += more
    return given


def spread(count: int, among: int) -> Int[Tensor, " count"]:
    """Return different numbers below another one, ascending, one drawn from each of `count` parts of the same size."""
    edges = torch.arange(count + 1) * among // count
    sizes = edges.diff()
    drawn = (uniform((count,), edges.double(), seed=0) + 1) / 2
    return edges[:-1] + torch.minimum((drawn * sizes).long(), sizes - 1)
