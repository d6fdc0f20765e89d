"""At which rank a query's positive stands among all keys, exactly, without sorting anything.

The rank of a positive is the number of keys that score higher, plus the keys before it that score
the same. Two passes over the same tiles: the first finds each query's best positive, the second
counts. Both read the score out of the same matrix product, so a positive compares equal to itself
to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.topk.search import DEFAULT_TILE, check_pair, prepared


def rank_of(
    queries: Tensor,
    keys: Tensor,
    positive_index: Tensor,
    *,
    positive_offsets: Tensor | None = None,
    tile: int = DEFAULT_TILE,
    normalize: bool = True,
) -> Tensor:
    """int64 [N]: rank, counted from 0, of each query's best-placed positive among all M keys.

    positive_index: int64 [N], or, with positive_offsets int64 [N + 1], a ragged list in which query
    i owns the entries positive_offsets[i] to positive_offsets[i + 1]. A query without a positive
    has rank -1. No gradient.
    """
    check_pair(queries, keys, tile)
    n, m, device = len(queries), len(keys), queries.device
    if positive_offsets is None:
        positive_offsets = torch.arange(n + 1, device=device)
    if positive_offsets.shape != (n + 1,) or (
        n and int(positive_offsets[-1]) != len(positive_index)
    ):
        raise ValueError(
            f"positive_offsets: expected {n + 1} of them, the last {len(positive_index)}, as "
            "positive_index"
        )
    if len(positive_index) and (int(positive_index.min()) < 0 or int(positive_index.max()) >= m):
        raise ValueError(f"positive_index: expected 0 to {m - 1}")
    counts = positive_offsets.diff()
    owner = torch.repeat_interleave(torch.arange(n, device=device), counts)
    ranks = torch.full((n,), -1, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, n, tile):
            rows = slice(start, start + tile)
            begin, end = int(positive_offsets[start]), int(positive_offsets[min(start + tile, n)])
            ranks[rows] = _ranks(
                prepared(queries[rows], normalize),
                keys,
                owner[begin:end] - start,
                positive_index[begin:end],
                tile,
                normalize,
            )
    return ranks.masked_fill_(counts == 0, -1)


def _ranks(
    left: Tensor, keys: Tensor, owner: Tensor, index: Tensor, tile: int, normalize: bool
) -> Tensor:
    """Ranks of one block of queries; positive p is key index[p] of query owner[p]."""
    n, m = len(left), len(keys)
    score = left.new_empty(len(index))
    for first in range(0, m, tile):
        here = (index >= first) & (index < first + tile)
        if here.any():
            scores = left @ prepared(keys[first : first + tile], normalize).T
            score[here] = scores[owner[here], index[here] - first]
    best = left.new_full((n,), -torch.inf).scatter_reduce(0, owner, score, "amax")
    at_best = score == best[owner]
    place = torch.full((n,), m, dtype=torch.int64, device=left.device)
    place = place.scatter_reduce(0, owner[at_best], index[at_best], "amin")

    ranks = torch.zeros(n, dtype=torch.int64, device=left.device)
    for first in range(0, m, tile):
        scores = left @ prepared(keys[first : first + tile], normalize).T
        before = torch.arange(first, first + scores.shape[1], device=left.device) < place[:, None]
        ranks += ((scores > best[:, None]) | ((scores == best[:, None]) & before)).sum(1)
    return ranks
