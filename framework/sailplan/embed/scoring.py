"""Exact counts over all query-candidate cosines without ever holding the whole matrix.

Every metric here is a sum of integer counts over tiles of the score matrix. Each rank walks its own
query rows (`share`) and reads the candidates in parts, as often as it has blocks of queries; the
counts are summed over the ranks, so any number of ranks gives the same integers. Tiles are
multiplied in float64 and rounded once to float32: the shape of a tile, which changes with the
number of ranks, then changes a score about once in 10^8, by its last bit, and equal rows stay tied.

Shape legend: n queries, m candidates, D dimensions, p positive pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sailplan.embed.sides import Side, side_of
from sailplan.runtime.watch import beat, together
from sailplan_kernels.exchange import Local
from sailplan_kernels.exchange.base import Exchange
from sailplan_kernels.topk.search import packed, unpacked

ALONE = Local()
Span = slice
SCORES, CANDIDATES = 1 << 20, 1024  # of a tile


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

    def within(self, queries: Span, candidates: Span) -> Pairs:
        """The pairs of a tile, counted from its corner."""
        found = self.slice(queries.start, queries.stop)
        here = (found.columns >= candidates.start) & (found.columns < candidates.stop)
        return Pairs(found.rows[here], found.columns[here] - candidates.start)

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.rows.to(device), self.columns.to(device))


def share(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's contiguous part of n rows: (start, stop); parts differ by at most one row."""
    return n * rank // world_size, n * (rank + 1) // world_size


def tiles(
    queries: Side, candidates: Side, exchange: Exchange = ALONE, scores: int = SCORES
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (queries, candidates, their cosines float32 [t, c]) over this rank's share of the
    queries and all candidates, about `scores` at once.

    All ranks go through as many blocks of queries and obey a stop signal between them. Collective.
    """
    start, stop = share(len(queries), exchange.rank, exchange.world_size)
    step = _steps(len(candidates), scores)[0]
    for number in range(-(-len(queries) // (exchange.world_size * step))):
        together()
        first = start + number * step
        if first < stop:
            yield from _tiles(queries, candidates, (first, min(stop, first + step)), scores)


def _tiles(
    queries: Side, candidates: Side, rows: tuple[int, int], scores: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    step, across = _steps(len(candidates), scores)
    for start in range(*rows, step):
        here = slice(start, min(start + step, rows[1]))
        own = queries.part(here.start, here.stop)
        for first in range(0, len(candidates), across):
            beat()
            there = slice(first, min(first + across, len(candidates)))
            others = candidates.part(there.start, there.stop)
            yield here, there, (own @ others.T).float()


def _steps(candidates: int, scores: int) -> tuple[int, int]:
    """Return how many queries and candidates a tile has."""
    across = max(1, min(candidates, CANDIDATES))
    return max(1, scores // across), across


def best_columns(
    queries: Side,
    candidates: Side,
    k: int,
    exchange: Exchange | None = ALONE,
    hidden: Pairs | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosines float32 [r, k] and numbers int64 [r, k] of the best candidates of this rank's
    share of r queries, best first, ties by the lower number; -inf and -1 where there are fewer.

    exchange: None: of all queries, without meeting other ranks. hidden: candidates left out.
    """
    start, stop = (
        (0, len(queries))
        if exchange is None
        else share(len(queries), exchange.rank, exchange.world_size)
    )
    nothing = torch.iinfo(torch.int64).min
    best = torch.full((stop - start, k), nothing, dtype=torch.int64, device=queries.device)
    walk = (
        _tiles(queries, candidates, (start, stop), SCORES)
        if exchange is None
        else tiles(queries, candidates, exchange)
    )
    for here, there, scores in walk:
        if hidden is not None:
            left_out = hidden.within(here, there)
            scores[left_out.rows, left_out.columns] = -torch.inf
        index = torch.arange(there.start, there.stop, device=scores.device)
        order = packed(scores, index).masked_fill_(scores == -torch.inf, nothing)
        rows = slice(here.start - start, here.stop - start)
        both = torch.cat([best[rows], order.topk(min(k, order.shape[1]), dim=1).values], 1)
        best[rows] = both.topk(k, dim=1).values
    return unpacked(best)


def pair_scores(queries: Side, candidates: Side, pairs: Pairs, first: int = 0) -> Tensor:
    """Cosine of every listed pair, float32 [p], rounded as in `tiles`; rows count from query
    `first` on.
    """
    parts = [
        (queries.take(rows + first) * candidates.take(columns)).sum(-1).float()
        for rows, columns in zip(pairs.rows.split(512), pairs.columns.split(512), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=queries.device)


def shared_pair_scores(
    queries: Side, candidates: Side, pairs: Pairs, exchange: Exchange = ALONE
) -> Tensor:
    """Return `pair_scores` of all pairs, sorted by row, on every rank; each scores those of its
    share of the queries. Collective.
    """
    bounds = torch.tensor(share(len(queries), exchange.rank, exchange.world_size))
    first, last = torch.searchsorted(pairs.rows, bounds.to(pairs.rows.device)).tolist()
    found = torch.zeros(len(pairs.rows), device=queries.device)
    mine = Pairs(pairs.rows[first:last], pairs.columns[first:last])
    found[first:last] = pair_scores(queries, candidates, mine)
    return exchange.sum(found)


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
    queries: Tensor | Side,
    candidates: Tensor | Side,
    positives: Pairs,
    exchange: Exchange = ALONE,
    scores: int = SCORES,
) -> NegativeCounts:
    """Places every negative score among the positive scores: all that AUC and the best F1
    threshold need.

    queries [n, D], candidates [m, D], the same on all ranks; negatives are all n * m pairs not in
    `positives`, which are sorted by row. O(n m log p) time; 30 bytes of memory for each of the
    `scores` at once. Raises ValueError when there is no positive pair.
    """
    left, right = side_of(queries), side_of(candidates)
    found = shared_pair_scores(left, right, positives, exchange)
    if not len(found):
        raise ValueError("positives is empty: expected at least one positive pair")
    values, multiplicity = torch.unique(found, return_counts=True)
    u = len(values)
    at_least = torch.zeros(
        u + 1, dtype=torch.int64, device=left.device
    )  # [j]: pairs with exactly j values <= score
    more_than = torch.zeros_like(at_least)
    for _, _, scored in tiles(left, right, exchange, scores):
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
        negatives=len(left) * len(right) - len(found),
    )
