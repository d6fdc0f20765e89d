"""Exact top-k: score a tile of queries against a tile of keys, keep the k best so far, go on.

Score and index are packed into one 64-bit integer that sorts as "higher score, then lower index", so that merging is
a plain top-k of unique numbers: ties always go to the lower index, whatever the tile and on every device. Scores are
float32 (half-precision inputs are raised first).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.normalize import normalize as normalize_rows

DEFAULT_TILE = 4096
_NOTHING = torch.iinfo(torch.int64).min
_LOW = 0xFFFFFFFF


def topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    max_score: float | None = None,
    exclude_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    tile: int = DEFAULT_TILE,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k best keys of each query: scores float32 [N, k] and indices int64 [N, k], best first.

    queries [N, D], keys [M, D]; cosines with ``normalize``, else plain dot products. max_score: only keys that score
    below it (the best below a threshold). exclude_ids int64 [N, E], -1 for none: keys never returned for that query,
    by key_ids int64 [M], or by index without them. tile: rows of queries and of keys scored at a time; memory is
    O(tile^2 + N k). Where fewer than k keys remain, the score is -inf and the index -1. No gradient.
    """
    check_pair(queries, keys, tile)
    if k < 1:
        raise ValueError(f"k: found {k}, expected at least 1")
    n, m = len(queries), len(keys)
    if exclude_ids is not None and (exclude_ids.dim() != 2 or len(exclude_ids) != n):
        raise ValueError(f"exclude_ids: found shape {tuple(exclude_ids.shape)}, expected ({n}, E)")
    if key_ids is not None and key_ids.shape != (m,):
        raise ValueError(f"key_ids: found shape {tuple(key_ids.shape)}, expected ({m},)")
    if key_ids is None:
        key_ids = torch.arange(m, device=keys.device)
    best = torch.full((n, k), _NOTHING, dtype=torch.int64, device=queries.device)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        for start in range(0, n, tile):
            rows = slice(start, start + tile)
            left = prepared(queries[rows], normalize)
            for first in range(0, m, tile):
                columns = slice(first, first + tile)
                scores = left @ prepared(keys[columns], normalize).T
                dropped = scores.isnan()
                if max_score is not None:
                    dropped |= scores >= max_score
                if exclude_ids is not None:
                    for ids in exclude_ids[rows].unbind(1):
                        dropped |= (key_ids[columns] == ids[:, None]) & (ids[:, None] >= 0)
                packed = _pack(scores, first).masked_fill_(dropped, _NOTHING)
                packed = packed.topk(min(k, packed.shape[1]), dim=1).values
                best[rows] = torch.cat([best[rows], packed], 1).topk(k, dim=1).values
    return _unpack(best)


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """A tile in float32, normalised where asked."""
    x = x.to(torch.float32)
    return normalize_rows(x) if normalize else x


def check_pair(queries: Tensor, keys: Tensor, tile: int) -> None:
    """[N, D] and [M, D] of floats, and a tile of at least one row."""
    for name, x in (("queries", queries), ("keys", keys)):
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"{name}: found {x.dtype} {tuple(x.shape)}, expected a float matrix")
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys: found {keys.shape[1]} dimensions, expected {queries.shape[1]} as queries")
    if tile < 1:
        raise ValueError(f"tile: found {tile}, expected at least 1")
    if len(keys) >= _LOW:
        raise ValueError(f"keys: found {len(keys)} rows, expected fewer than {_LOW}")


def _pack(scores: Tensor, first: int) -> Tensor:
    """int64, ordered by score and then by falling index."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    index = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (ordered << 32) | (_LOW - index)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    index = _LOW - (packed & _LOW)
    ordered = packed >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    missing = packed == _NOTHING
    return bits.view(torch.float32).masked_fill(missing, -torch.inf), index.masked_fill(missing, -1)
