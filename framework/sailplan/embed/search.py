"""Exact nearest keys of queries, both in the store: what brute force finds, ties included, without
its price.

A block of queries meets the keys' files one after the other, in the compute dtype, and keeps k and
a margin of candidates. These are scored again exactly: multiplied in float64 and rounded once to
float32. The result is the exact one where the k-th exact score lies above all that were left out,
by more than the compute dtype can be wrong; the queries for which this does not hold (many equal
scores, mostly) are searched again in the next dtype, at last in float64 with ties by the lower row.

Excluded keys are sparse rows. Few of them are struck out one by one; those of a query text that has
many, once for all of its queries.

Memory: a block of queries, a file's part of the keys, a tile of scores; nothing grows with either
side.

Shape legend: b queries of a block, t keys of a tile, D dimensions, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from sailplan_kernels.topk.search import packed, unpacked

MARGIN = 28  # candidates beside k
MANY = 64  # excluded keys of a query that are struck out together with its like
KEYS, ROWS = 512, 512  # of a tile of scores on a CPU; on a device 16 times as many
EXACT_PAIRS = 512  # scored again at once
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


class KeyFiles:
    """Keys on disk: pairs of files with rows int64 [m] and raw vectors [m, D]; rows rise from
    file to file.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]]) -> None:
        self.files = files
        self.bytes = 0  # of vectors, read so far

    def tiles(self, size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield rows [t] and vectors float32 [t, D] of at most `size` keys."""
        for rows_file, vectors_file in self.files:
            rows, mapped = np.load(rows_file), np.load(vectors_file, mmap_mode="r")
            with open(vectors_file, "rb") as file:
                file.seek(mapped.offset)
                for start in range(0, len(rows), size):
                    some = rows[start : start + size]
                    flat = np.fromfile(file, mapped.dtype, len(some) * mapped.shape[1])
                    self.bytes += flat.nbytes
                    yield some, flat.reshape(len(some), -1).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Excluded:
    """Keys that are no result of a query, by groups of queries that share them.

    Pairs (group, row of the key) rise by row. A query without any has the group -1.
    """

    groups: NDArray[np.int64]  # [b] of each query
    pair_groups: NDArray[np.int64]  # [p]
    pair_rows: NDArray[np.int64]  # [p]

    @staticmethod
    def none(count: int) -> Excluded:
        empty = np.empty(0, dtype=np.int64)
        return Excluded(np.full(count, -1, dtype=np.int64), empty, empty)

    def take(self, queries: NDArray[np.int64]) -> Excluded:
        """Return those of some queries; the pairs of others stay, and do no harm."""
        return Excluded(self.groups[queries], self.pair_groups, self.pair_rows)


@dataclass
class SearchStats:
    """What searches cost so far."""

    queries: int = 0
    again: dict[str, int] = field(default_factory=dict)  # dtype -> queries that came to it


class _Strikes:
    """The excluded keys of one tile of queries, ready for tiles of keys in rising order."""

    def __init__(self, excluded: Excluded, device: torch.device) -> None:
        present = np.unique(excluded.groups[excluded.groups >= 0])
        groups, rows = excluded.pair_groups, excluded.pair_rows
        here = np.isin(groups, present)
        groups, rows = np.searchsorted(present, groups[here]), rows[here]
        counts = np.bincount(groups, minlength=len(present))
        many = counts > MANY
        self._device = device
        # Those with many: a mask of all such groups, and which queries look at which of its lines
        self._lines = np.cumsum(many) - 1
        self._number = int(many.sum())
        self._many = groups[many[groups]], rows[many[groups]]
        of_queries = np.searchsorted(present, excluded.groups.clip(min=0))
        named = excluded.groups >= 0
        common = named.copy()
        common[named] = many[of_queries[named]]
        self._common = np.flatnonzero(common)
        self._common_lines = torch.from_numpy(self._lines[of_queries[self._common]]).to(device)
        self._common_index = torch.from_numpy(self._common).to(device)
        # Those with few: one pair for each query and key
        single = np.flatnonzero(named & ~common)
        few = ~many[groups]
        order = np.argsort(groups[few], kind="stable")
        by_group, key_rows = groups[few][order], rows[few][order]
        first = np.searchsorted(by_group, of_queries[single])
        lengths = np.searchsorted(by_group, of_queries[single], side="right") - first
        queries = np.repeat(single, lengths)
        inside = np.arange(len(queries)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = key_rows[np.repeat(first, lengths) + inside]
        rising = np.argsort(keys, kind="stable")
        self._few = queries[rising], keys[rising]

    def apply(self, scores: Tensor, rows: NDArray[np.int64]) -> None:
        """Strike excluded keys out of scores [b, t]; rows int64 [t] of the keys."""
        if not len(rows):
            return
        queries, columns = self._within(*self._few, rows)
        if len(queries):
            index = torch.from_numpy(np.stack([queries, columns])).to(self._device)
            scores[index[0], index[1]] = -torch.inf
        groups, columns = self._within(*self._many, rows)
        if len(groups):
            mask = torch.zeros(self._number, len(rows), dtype=torch.bool)
            mask[torch.from_numpy(self._lines[groups]), torch.from_numpy(columns)] = True
            struck = mask.to(self._device)[self._common_lines]
            if len(self._common) == len(scores):
                scores.masked_fill_(struck, -torch.inf)
            else:
                part = scores[self._common_index].masked_fill_(struck, -torch.inf)
                scores[self._common_index] = part

    @staticmethod
    def _within(
        others: NDArray[np.int64], keys: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pairs whose key is among the tile's rows, with its column."""
        part = slice(*np.searchsorted(keys, [rows[0], rows[-1] + 1]).tolist())
        columns = np.searchsorted(rows, keys[part])
        there = rows[columns] == keys[part]
        return others[part][there], columns[there]


def nearest(
    queries: Tensor,
    keys: KeyFiles,
    k: int,
    *,
    max_score: float | None = None,
    excluded: Excluded | None = None,
    device: torch.device | None = None,
    progress: Callable[[], None] = lambda: None,
    stats: SearchStats | None = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the cosines float32 [b, k] of each query's best keys and their rows int64 [b, k],
    best first; -inf and -1 where there are fewer.

    queries: raw float32 [b, D]. max_score: keys that score below it. progress: called for each tile
    of keys.
    """
    device = device or queries.device
    excluded = excluded or Excluded.none(len(queries))
    scores = torch.full((len(queries), k), -torch.inf)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    left = np.arange(len(queries), dtype=np.int64)
    dtypes = [torch.bfloat16] if device.type == "cuda" else []
    stats = stats or SearchStats()
    stats.queries += len(queries)
    for dtype in (*dtypes, torch.float32, torch.float64):
        if not len(left):
            break
        stats.again[str(dtype)] = stats.again.get(str(dtype), 0) + len(left)
        some = queries if len(left) == len(queries) else queries[torch.from_numpy(left)]
        search = _Search(some, keys, k, max_score, excluded.take(left), device, dtype)
        found, places, proved = search.run(progress)
        scores[torch.from_numpy(left[proved])] = found[torch.from_numpy(proved)]
        rows[left[proved]] = places[proved]
        left = left[~proved]
    return scores, rows


class _Search:
    """One pass over the keys in one dtype, and the scores of its candidates."""

    def __init__(
        self,
        queries: Tensor,
        keys: KeyFiles,
        k: int,
        max_score: float | None,
        excluded: Excluded,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._queries, self._keys, self._k, self._max = queries, keys, k, max_score
        self._device, self._dtype = device, dtype
        self._exact = dtype == torch.float64
        larger = 16 if device.type == "cuda" else 1
        self._tile, step = larger * KEYS, larger * ROWS
        self._slices = [slice(start, start + step) for start in range(0, len(queries), step)]
        self._strikes = [
            _Strikes(excluded.take(np.arange(len(queries))[part]), device) for part in self._slices
        ]
        dimension = queries.shape[1]
        inputs = 0.0 if self._exact else 2 * _UNIT[dtype] + _UNIT[dtype] ** 2
        self._error = 0.0 if self._exact else inputs + (dimension + 2) * 2.0**-24

    def run(
        self, progress: Callable[[], None]
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
        """Return scores [b, k], rows [b, k] and for which queries they are proved [b]."""
        count = self._k if self._exact else self._k + MARGIN
        values = torch.full((len(self._queries), count), -torch.inf, device=self._device)
        rows = torch.full(values.shape, -1, dtype=torch.int64, device=self._device)
        own = torch.empty(self._queries.shape, dtype=self._dtype, device=self._device)
        for part in self._slices:
            own[part] = self._unit(self._queries[part])
        for key_rows, vectors in self._keys.tiles(self._tile):
            progress()
            others = self._unit(torch.from_numpy(vectors))
            index = torch.from_numpy(key_rows).to(self._device)
            for part, strikes in zip(self._slices, self._strikes, strict=True):
                scores = self._multiply(own[part], others)
                if self._max is not None:
                    scores.masked_fill_(scores >= self._max + self._error, -torch.inf)
                strikes.apply(scores, key_rows)
                self._merge(values[part], rows[part], scores, index)
        if self._exact:
            return values.cpu(), rows.cpu().numpy(), np.ones(len(values), dtype=bool)
        return self._proved(values, rows, progress)

    def _unit(self, vectors: Tensor) -> Tensor:
        return normalize(vectors.to(self._device).double(), dim=-1).to(self._dtype)

    def _multiply(self, own: Tensor, others: Tensor) -> Tensor:
        if self._dtype == torch.bfloat16:
            return torch.mm(own, others.T, out_dtype=torch.float32)
        return (own @ others.T).float()

    def _merge(self, values: Tensor, rows: Tensor, scores: Tensor, index: Tensor) -> None:
        """Put the best of a tile's scores [b, t] among the best so far, in place."""
        better = (scores.amax(1) > values[:, -1]).nonzero().flatten()
        if not len(better):
            return
        count = values.shape[1]
        if len(better) < len(scores):
            scores, best, places = scores[better], values[better], rows[better]
        else:
            best, places = values, rows
        if self._exact:
            # A tile's rows come after those so far, so equal scores keep the lower row
            order = packed(scores, index).topk(min(count, scores.shape[1]), dim=1).values
            before = packed(best, places).masked_fill_(places < 0, torch.iinfo(torch.int64).min)
            order = torch.where(
                unpacked(order)[0] == -torch.inf, torch.iinfo(torch.int64).min, order
            )
            merged, found = unpacked(torch.cat([before, order], 1).topk(count, dim=1).values)
        else:
            top, columns = scores.topk(min(count, scores.shape[1]), dim=1)
            merged, chosen = torch.cat([best, top], 1).topk(count, dim=1)
            found = torch.cat([places, index[columns]], 1).gather(1, chosen)
            found = found.masked_fill(merged == -torch.inf, -1)
        values[better], rows[better] = merged, found

    def _proved(
        self, values: Tensor, rows: Tensor, progress: Callable[[], None]
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
        """Score the candidates [b, c] again, and see which results nothing that was left out can
        change.
        """
        last = values[:, -1].cpu()
        places = rows.cpu().numpy()
        exact = self._score(places, progress)
        if self._max is not None:
            exact.masked_fill_(exact >= self._max, -torch.inf)
        order = packed(exact, torch.from_numpy(places.clip(min=0)))
        best = order.masked_fill_(exact == -torch.inf, torch.iinfo(torch.int64).min)
        scores, found = unpacked(best.topk(self._k, dim=1).values)
        proved = (last == -torch.inf) | (scores[:, -1] > last + 2 * self._error)
        return scores, found.numpy(), proved.numpy()

    def _score(self, places: NDArray[np.int64], progress: Callable[[], None]) -> Tensor:
        """Return exact cosines float32 [b, c] of candidates' rows, -inf where there is none."""
        flat = places.ravel()
        order = np.argsort(flat, kind="stable")
        order = order[np.searchsorted(flat[order], 0) :]
        wanted = flat[order]
        scores = torch.full((len(flat),), -torch.inf)
        for key_rows, vectors in self._keys.tiles(self._tile):
            part = slice(*np.searchsorted(wanted, [key_rows[0], key_rows[-1] + 1]).tolist())
            if part.start == part.stop:
                continue
            progress()
            columns = np.searchsorted(key_rows, wanted[part])
            for start in range(0, len(columns), EXACT_PAIRS):
                some = order[part][start : start + EXACT_PAIRS]
                own = self._queries[torch.from_numpy(some // places.shape[1])]
                others = torch.from_numpy(vectors[columns[start : start + EXACT_PAIRS]])
                pair = [normalize(side.to(self._device).double(), dim=-1) for side in (own, others)]
                scores[torch.from_numpy(some)] = (pair[0] * pair[1]).sum(-1).float().cpu()
        return scores.view(places.shape)
