"""Which keys are a row's positives: a list of (row, key) pairs, whichever way the caller said it.

By index a row has one positive at most, a key of its own rank. By id its positives are all valid keys of all ranks that
carry the id it asks for; an item that was drawn twice is as right as once. Every rank knows all keys' ids, so each lists
its own rows' pairs without asking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sailplan_kernels.infonce.masks import Candidates


@dataclass(frozen=True)
class Pairs:
    """E pairs of rows that count, sorted by row."""

    rows: Tensor  # int64 [E], this rank's
    keys: Tensor  # int64 [E], index into all ranks' keys
    counts: Tensor  # int64 [N], positives of each row

    def of_rows(self, rows: slice) -> Pairs:
        """Those of consecutive rows, which are counted from 0 again."""
        some = (self.rows >= rows.start) & (self.rows < rows.stop)
        return Pairs(self.rows[some] - rows.start, self.keys[some], self.counts[rows])

    def per_row(self, values: Tensor) -> Tensor:
        """[P, N] sums of ``values`` [P, E], in an order that does not change."""
        return sum_at(self.rows, values, len(self.counts))

    def best(self, values: Tensor) -> Tensor:
        """[P, N] highest of ``values`` [P, E], minus infinity for rows without a positive."""
        return best_at(self.rows, values, len(self.counts))


def pairs_by_index(row_valid: Tensor, keys: Tensor) -> Pairs:
    """Of the rows that count, bool [N], with the key of each, int64 [N] index into all ranks' keys."""
    rows = row_valid.nonzero()[:, 0]
    return Pairs(rows, keys[rows], row_valid.to(torch.int64))


def pairs_by_id(wanted: Tensor, keys: Candidates) -> Pairs:
    """All pairs of a row that wants an id, int64 [N], -1 for none, and a valid key that has it. O((N + C) log C + E)."""
    places = keys.valid.nonzero()[:, 0]
    ids, order = keys.tags[places, 1].sort(stable=True)
    first, behind = torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True)
    counts = torch.where(wanted >= 0, behind - first, 0)
    rows = torch.arange(len(wanted), device=wanted.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    place = torch.arange(len(rows), device=wanted.device) - before[rows] + first[rows]
    return Pairs(rows, places[order[place]], counts)


def sum_at(index: Tensor, values: Tensor, n: int) -> Tensor:
    """[P, n] sums of ``values`` [P, E] that share an index [E]."""
    total = values.new_zeros(n, len(values))
    return total.index_put_((index,), values.T.contiguous(), accumulate=True).T.contiguous()


def best_at(index: Tensor, values: Tensor, n: int) -> Tensor:
    """[P, n] highest of ``values`` [P, E] that share an index [E], minus infinity where there is none."""
    return values.new_full((len(values), n), -torch.inf).scatter_reduce(1, index.expand(len(values), -1), values, "amax")
