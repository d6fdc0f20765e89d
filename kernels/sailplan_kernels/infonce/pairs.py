"""Which keys are a row's positives, whichever way the caller said it.

By index a row has one positive at most, a key of its own rank: row i is pair i, and a row that does
not count has weight 0.
Nothing has to be looked up, so the shapes do not depend on the data. By id a row's positives are
all valid keys of all ranks that carry the id it asks for, an item that was drawn twice being as
right as once: a list of (row, key) pairs, as long as the data make it. Every rank knows all keys'
ids, so each lists its own rows' pairs without asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sailplan_kernels.infonce.masks import Candidates


@dataclass(frozen=True)
class RowPairs:
    """One pair a row, n of them."""

    index: (
        Tensor | None
    )  # int64 [n] into this rank's keys; None: row i's positive is key ``start`` + i
    start: int
    count: int
    listed = False

    def of_rows(self, x: Tensor) -> Tensor:
        """[..., E] the rows' values [..., n]."""
        return x

    def per_row(self, values: Tensor) -> Tensor:
        """[P, n] sums of ``values`` [P, E]."""
        return values

    def best(self, values: Tensor) -> Tensor:
        """[P, n] highest of ``values`` [P, E]."""
        return values

    def of_chunks(self, chunks: list[slice]) -> list[slice]:
        """The pairs of each chunk of rows."""
        return chunks

    def sums(self, rows: slice, pairs: slice, values: Tensor) -> Tensor:
        """[P, rows] sums of the ``values`` of a chunk's pairs."""
        return values

    def own_keys(self, keys: Tensor, here: slice) -> Tensor:
        """[e, D] of this rank's ``keys``, those of the pairs ``here``."""
        return (
            keys[self.start + here.start : self.start + here.stop]
            if self.index is None
            else keys[self.index[here]]
        )


@dataclass(frozen=True)
class PairList:
    """E pairs of rows that count, sorted by row."""

    rows: Tensor  # int64 [E], this rank's
    keys: Tensor  # int64 [E], index into all ranks' keys
    counts: Tensor  # int64 [N], positives of each row
    listed = True

    @property
    def count(self) -> int:
        return len(self.rows)

    def share(self, rows: slice) -> PairList:
        """Those of consecutive rows, which are counted from 0 again."""
        if rows.indices(len(self.counts)) == (0, len(self.counts), 1):
            return self  # nothing to pick, which the host would wait for
        some = (self.rows >= rows.start) & (self.rows < rows.stop)
        return PairList(self.rows[some] - rows.start, self.keys[some], self.counts[rows])

    def of_rows(self, x: Tensor) -> Tensor:
        return x[..., self.rows]

    def per_row(self, values: Tensor) -> Tensor:
        """In an order that does not change."""
        return sum_at(self.rows, values, len(self.counts))

    def best(self, values: Tensor) -> Tensor:
        """Minus infinity for rows without a positive."""
        return best_at(self.rows, values, len(self.counts))

    def of_chunks(self, chunks: list[slice]) -> list[slice]:
        if len(chunks) == 1:  # all rows: no answer to wait for
            return [slice(0, len(self.rows))]
        edges = torch.tensor([chunk.start for chunk in chunks], device=self.rows.device)
        starts = [*torch.searchsorted(self.rows, edges).tolist(), len(self.rows)]
        return [slice(*edge) for edge in pairwise(starts)]

    def sums(self, rows: slice, pairs: slice, values: Tensor) -> Tensor:
        return sum_at(self.rows[pairs] - rows.start, values, rows.stop - rows.start)


def pairs_by_index(row_valid: Tensor, keys: Tensor) -> PairList:
    """Of the rows that count, bool [N], with the key of each, int64 [N] index into all ranks'
    keys.
    """
    rows = row_valid.nonzero()[:, 0]
    return PairList(rows, keys[rows], row_valid.to(torch.int64))


def pairs_by_id(wanted: Tensor, keys: Candidates) -> PairList:
    """All pairs of a row that wants an id, int64 [N], -1 for none, and a valid key that has it.

    O((N + C) log C + E).
    """
    # Keys that are not valid come first, under an id that no row wants
    ids, order = torch.where(keys.valid, keys.tags[:, 1], -1).sort(stable=True)
    first, behind = torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True)
    counts = torch.where(wanted >= 0, behind - first, 0)
    rows = torch.arange(len(wanted), device=wanted.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    place = torch.arange(len(rows), device=wanted.device) - before[rows] + first[rows]
    return PairList(rows, order[place], counts)


def sum_at(index: Tensor, values: Tensor, n: int) -> Tensor:
    """[P, n] sums of ``values`` [P, E] that share an index [E]."""
    total = values.new_zeros(n, len(values))
    return total.index_put_((index,), values.T.contiguous(), accumulate=True).T.contiguous()


def best_at(index: Tensor, values: Tensor, n: int) -> Tensor:
    """[P, n] highest of ``values`` [P, E] that share an index [E], minus infinity where there is
    none.
    """
    return values.new_full((len(values), n), -torch.inf).scatter_reduce(
        1, index.expand(len(values), -1), values, "amax"
    )
