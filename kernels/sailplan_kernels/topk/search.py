"""Exact top-k: score a tile of queries against a tile of keys, keep the k best so far, go on.

Score and index are packed into one 64-bit integer that sorts as "higher score, then lower index",
so that merging is a plain top-k of unique numbers: ties always go to the lower index, whatever the
tile and on every device. Scores are float32 (half-precision inputs are raised first; where both are
float64, they are multiplied so and rounded once, so that the shape of a tile, which changes with
the number of ranks, changes a score about once in 10^8, by its last bit).

Across ranks the keys come past in shards, as in the losses: each rank scores its own queries
against all keys and holds what its exchange holds, at least a shard. Only ids are gathered whole, 8
bytes a key.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from sailplan_kernels.exchange import Exchange, Local
from sailplan_kernels.tiling.normalize import normalize as normalize_rows

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
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best keys of each query: scores float32 [N, k] and indices int64 [N, k], best first.

    queries [N, D], keys [M, D]; cosines with ``normalize``, else plain dot products. max_score:
    only keys that score below it (the best below a threshold). exclude_ids int64 [N, E], -1 for
    none: keys never returned for that query, by key_ids int64 [M], or by index without them. tile:
    rows of queries and of keys scored at a time; memory is O(tile^2 + N k). Where fewer than k keys
    remain, the score is -inf and the index -1. No gradient.

    exchange: queries and keys are this rank's; its queries find the best of all ranks' keys, whose
    indices count all keys in rank order. N, M and E may differ and be 0; all ranks call, with the
    same other arguments (the dtype and whether there are key_ids included).
    """
    check_pair(queries, keys, tile)
    if k < 1:
        raise ValueError(f"k: found {k}, expected at least 1")
    n, m = len(queries), len(keys)
    if exclude_ids is not None and (exclude_ids.dim() != 2 or len(exclude_ids) != n):
        raise ValueError(f"exclude_ids: found shape {tuple(exclude_ids.shape)}, expected ({n}, E)")
    if key_ids is not None and key_ids.shape != (m,):
        raise ValueError(f"key_ids: found shape {tuple(key_ids.shape)}, expected ({m},)")
    exchange = Local() if exchange is None else exchange
    sizes = _agreed(
        exchange,
        m,
        keys,
        (keys.shape[1], keys.dtype, queries.dtype, k, max_score, key_ids is None, normalize),
    )
    key_ids = (
        torch.arange(sum(sizes), device=keys.device)
        if key_ids is None
        else exchange.gather(key_ids, sizes)
    )
    dtype = torch.float64 if queries.dtype == keys.dtype == torch.float64 else torch.float32
    best = torch.full((n, k), _NOTHING, dtype=torch.int64, device=queries.device)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        for shard in exchange.stream(keys, sizes, torch.float32).shards():
            for start in range(0, n, tile):
                rows = slice(start, start + tile)
                left = prepared(queries[rows], normalize, dtype)
                for first in range(0, len(shard.vectors), tile):
                    scores = (
                        left @ prepared(shard.vectors[first : first + tile], normalize, dtype).T
                    ).to(torch.float32)
                    columns = slice(shard.start + first, shard.start + first + scores.shape[1])
                    dropped = scores.isnan()
                    if max_score is not None:
                        dropped |= scores >= max_score
                    if exclude_ids is not None:
                        for ids in exclude_ids[rows].unbind(1):
                            dropped |= (key_ids[columns] == ids[:, None]) & (ids[:, None] >= 0)
                    index = torch.arange(columns.start, columns.stop, device=scores.device)
                    found = packed(scores, index).masked_fill_(dropped, _NOTHING)
                    found = found.topk(min(k, found.shape[1]), dim=1).values
                    best[rows] = torch.cat([best[rows], found], 1).topk(k, dim=1).values
    return unpacked(best)


def _agreed(exchange: Exchange, m: int, like: Tensor, call: tuple[object, ...]) -> list[int]:
    """Every rank's number of keys; an error on all ranks where they were called differently."""
    numbers = torch.tensor([[m, zlib.crc32(repr(call).encode())]], device=like.device)
    table = exchange.gather(numbers, [1] * exchange.world_size).tolist()
    if len({row[1] for row in table}) > 1:
        raise ValueError(
            "topk: ranks differ in dimensions, dtype, ids given, k, max_score or normalize, "
            "expected equal calls"
        )
    if sum(row[0] for row in table) >= _LOW:
        raise ValueError(
            f"keys: found {sum(row[0] for row in table)} rows on all ranks, expected fewer than "
            f"{_LOW}"
        )
    return [row[0] for row in table]


def prepared(x: Tensor, normalize: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tile in ``dtype``, normalised where asked."""
    x = x.to(dtype)
    return normalize_rows(x) if normalize else x


def check_pair(queries: Tensor, keys: Tensor, tile: int) -> None:
    """[N, D] and [M, D] of floats, and a tile of at least one row."""
    for name, x in (("queries", queries), ("keys", keys)):
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"{name}: found {x.dtype} {tuple(x.shape)}, expected a float matrix")
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys: found {keys.shape[1]} dimensions, expected {queries.shape[1]} as queries"
        )
    if tile < 1:
        raise ValueError(f"tile: found {tile}, expected at least 1")


def packed(scores: Tensor, index: Tensor) -> Tensor:
    """Return int64 [N, M] that order by score [N, M] and then by falling index [M] or [N, M]."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (_LOW - index)


def unpacked(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and indices of `packed` values; -inf and -1 of the lowest integer."""
    index = _LOW - (values & _LOW)
    ordered = values >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    missing = values == _NOTHING
    return bits.view(torch.float32).masked_fill(missing, -torch.inf), index.masked_fill(missing, -1)
