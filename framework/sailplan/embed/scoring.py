"""Exact counts over all query-candidate cosines without ever holding the whole matrix.

Every metric here is a sum of integer counts over tiles of the score matrix. Each rank walks its own
query rows (`share`), the counts are summed over the ranks, so any number of ranks gives the same
integers. Tiles are multiplied in float64 and rounded once to float32: the shape of a tile, which
changes with the number of ranks, then changes a score about once in 10^8, by its last bit, and
equal rows stay tied.

Shape legend: n queries, m candidates, D dimensions, p positive pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sailplan.runtime.watch import beat
from sailplan_kernels.exchange import Local
from sailplan_kernels.exchange.base import Exchange

ALONE = Local()


@dataclass(frozen=True)
class Pairs:
    """A relation between queries and candidates: which pairs are positives, or which are left
    out of the ranking.
    """

    rows: Tensor  # int64 [p], query indices
    columns: Tensor  # int64 [p], candidate indices; no pair twice

    @staticmethod
    def of(rows: Tensor, columns: Tensor) -> Pairs:
        """Sorted by row, then column, with repeated pairs dropped."""
        if not len(rows):
            return Pairs(rows.long(), columns.long())
        unique = torch.unique(torch.stack([rows.long(), columns.long()]), dim=1)
        return Pairs(unique[0].contiguous(), unique[1].contiguous())

    @staticmethod
    def equal(query_labels: Tensor, candidate_labels: Tensor) -> Pairs:
        """All pairs whose int64 labels (ids of documents or texts) are equal; O(p + (n + m) log
        m).
        """
        order = torch.argsort(candidate_labels, stable=True)
        ordered, query_labels = candidate_labels[order], query_labels.contiguous()
        first = torch.searchsorted(ordered, query_labels)
        count = torch.searchsorted(ordered, query_labels, right=True) - first
        rows = torch.arange(len(query_labels), device=query_labels.device).repeat_interleave(count)
        offset = torch.arange(len(rows), device=rows.device) - (
            count.cumsum(0) - count
        ).repeat_interleave(count)
        return Pairs.of(rows, order[first.repeat_interleave(count) + offset])

    def slice(self, start: int, stop: int) -> Pairs:
        """The pairs of queries start..stop, with rows counted from start."""
        first, last = torch.searchsorted(
            self.rows, torch.tensor([start, stop], device=self.rows.device)
        ).tolist()
        return Pairs(self.rows[first:last] - start, self.columns[first:last])

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.rows.to(device), self.columns.to(device))


def unit(vectors: Tensor) -> Tensor:
    """Rows of length one, float64 [n, D]; an all-zero row stays zero."""
    rows = vectors.to(torch.float64, copy=True)
    return rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min_(1e-12))


def share(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's contiguous part of n rows: (start, stop); parts differ by at most one row."""
    return n * rank // world_size, n * (rank + 1) // world_size


def tiles(
    queries: Tensor, candidates: Tensor, rows: tuple[int, int], tile: int = 4_000_000
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first query of the tile, float32 scores [t, m]) over the query rows start..stop,
    about `tile` scores at once.

    queries [n, D] and candidates [m, D] are unit vectors in float64.
    """
    step = max(1, tile // max(1, len(candidates)))
    for start in range(rows[0], rows[1], step):
        beat()
        yield start, (queries[start : min(start + step, rows[1])] @ candidates.T).float()


def pair_scores(queries: Tensor, candidates: Tensor, pairs: Pairs) -> Tensor:
    """Cosine of every listed pair, float32 [p], rounded as in `tiles`; inputs are unit vectors
    in float64.
    """
    parts = [
        (queries[rows] * candidates[columns]).sum(-1).float()
        for rows, columns in zip(pairs.rows.split(512), pairs.columns.split(512), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=queries.device)


def labelled_pairs(query_ids: Tensor, target_ids: Tensor, facts: Tensor) -> Pairs:
    """Pairs of queries [n] and targets [m] that a labelled fact joins by id; facts int64 [2, f]
    = (query id, target id).

    Queries with the same id (text) so share all their targets, and targets with the same id are all
    right.
    """
    asked, answered = Pairs.equal(query_ids, facts[0]), Pairs.equal(facts[1], target_ids)
    # Join on the fact: for each (query, fact) all (fact, target).
    counts = torch.bincount(answered.rows, minlength=facts.shape[1])
    starts = counts.cumsum(0) - counts
    repeat = counts[asked.columns]
    rows = asked.rows.repeat_interleave(repeat)
    offset = torch.arange(len(rows)) - (repeat.cumsum(0) - repeat).repeat_interleave(repeat)
    return Pairs.of(
        rows, answered.columns[starts[asked.columns].repeat_interleave(repeat) + offset]
    )


@dataclass(frozen=True)
class NegativeCounts:
    """Where all non-positive scores fall among the positive ones."""

    values: Tensor  # float32 [u], the distinct positive scores, rising
    positives: Tensor  # int64 [u], positives equal to each value
    at_or_above: Tensor  # int64 [u], negatives with score >= value
    above: Tensor  # int64 [u], negatives with score > value
    negatives: int  # all negatives


def count_negatives(
    queries: Tensor,
    candidates: Tensor,
    positives: Pairs,
    exchange: Exchange = ALONE,
    tile: int = 4_000_000,
) -> NegativeCounts:
    """Places every negative score among the positive scores: all that AUC and the best F1
    threshold need.

    queries [n, D], candidates [m, D], any float type, the same on all ranks; negatives are all n *
    m pairs not in `positives`. O(n m log p) time; 30 bytes of memory for each of the
    `tile` scores at once. Raises ValueError when there is
    no positive pair.
    """
    start, stop = share(len(queries), exchange.rank, exchange.world_size)
    parts = zip(positives.rows.split(512), positives.columns.split(512), strict=True)
    found = [(unit(queries[q]) * unit(candidates[c])).sum(-1).float() for q, c in parts]
    scores = torch.cat(found) if found else torch.zeros(0, device=queries.device)
    count, queries, candidates = len(queries), unit(queries[start:stop]), unit(candidates)
    if not len(scores):
        raise ValueError("positives is empty: expected at least one positive pair")
    values, multiplicity = torch.unique(scores, return_counts=True)
    u = len(values)
    at_least = torch.zeros(
        u + 1, dtype=torch.int64, device=queries.device
    )  # [j]: pairs with exactly j values <= score
    more_than = torch.zeros_like(at_least)
    for _, scored in tiles(queries, candidates, (0, len(queries)), tile):
        flat = scored.flatten()
        at_least += torch.bincount(torch.searchsorted(values, flat, right=True), minlength=u + 1)
        more_than += torch.bincount(torch.searchsorted(values, flat), minlength=u + 1)
    both = exchange.sum(torch.stack([at_least, more_than]))
    # Cumulative sums from the top; the positives themselves are in the tiles and are taken out
    # again.
    ahead = both.flip(1).cumsum(1).flip(1)[:, 1:]
    own = multiplicity.flip(0).cumsum(0).flip(0)
    return NegativeCounts(
        values=values,
        positives=multiplicity,
        at_or_above=(ahead[0] - own).clamp_min(0),
        above=(ahead[1] - (own - multiplicity)).clamp_min(0),
        negatives=count * len(candidates) - len(scores),
    )
