"""Metrics of sides that lie in the store: the numbers of tensors in memory, vectors read in parts, a
rank reads its own share of the queries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sailplan.embed import scoring
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.scoring import Pairs
from sailplan.embed.sides import InMemory, StoredSide
from sailplan.evaluate import metrics
from sailplan_kernels.exchange import AllGather, Local
from sailplan_kernels.testing import run_ranks

QUERIES, CANDIDATES, DIMENSION = 300, 500, 8


class CountedTable:
    """A table in memory that notes what is read of it; every fifth row has no vector."""

    def __init__(self, vectors: torch.Tensor) -> None:
        count = len(vectors)
        self.valid = np.arange(count) % 5 != 3
        ids = torch.from_numpy(np.where(self.valid, np.arange(count) // 2, -1))
        self.rows = EmbeddedRows(vectors, ids, np.arange(count), self.valid)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> EmbeddedRows:
        raise AssertionError("rows are taken")

    def identify(self, start: int, stop: int) -> EmbeddedRows:
        return self.rows.read(start, stop)

    def take(self, rows: NDArray[np.int64]) -> EmbeddedRows:
        self.reads.append(len(rows))
        return self.rows.take(rows)


def sides() -> tuple[CountedTable, CountedTable]:
    random = torch.Generator().manual_seed(0)
    candidates = torch.randn(CANDIDATES, DIMENSION, generator=random)
    candidates[10] = candidates[11]  # a tie
    queries = candidates[:QUERIES] + 0.8 * torch.randn(QUERIES, DIMENSION, generator=random)
    return CountedTable(queries), CountedTable(candidates)


def measured(queries: Any, candidates: Any, exchange: Any) -> dict[str, Any]:
    n = len(queries)
    rows = torch.arange(n)
    positives = Pairs.of(torch.cat([rows, rows[:50]]), torch.cat([rows, rows[:50] + 3]))
    excluded = Pairs(rows, (rows + 7) % len(candidates))
    rankings = [np.random.default_rng(row).permutation(len(candidates))[:20] for row in range(n)]
    ranks = metrics.best_positive_ranks(queries, candidates, positives, excluded, exchange)
    return {
        "ranks": ranks.tolist(),
        "auc": metrics.auc(queries, candidates, positives, exchange),
        "bijection": metrics.bijection(queries, candidates, None, exchange),
        "overlap": metrics.neighbour_overlap(queries, queries.cut(3), 10, exchange),
        **metrics.gap(queries, candidates, positives, exchange),
        **metrics.ranking_agreement(queries, candidates, rankings, [1, 10], excluded, exchange),
        **metrics.pair_agreement(queries, candidates, positives, 8),
    }


def of_the_store(rank: int, ranks: int) -> tuple[dict[str, Any], list[int], list[int], list[int]]:
    scoring.CANDIDATES, scoring.SCORES = 64, 64 * 16
    scoring.tiles.__defaults__ = (scoring.ALONE, scoring.SCORES)
    queries, candidates = sides()
    exchange = AllGather() if ranks > 1 else Local()
    left, right = (StoredSide.of(table, torch.device("cpu")) for table in (queries, candidates))
    rows = torch.arange(len(left))
    metrics.best_positive_ranks(left, right, Pairs(rows, rows), None, exchange)
    once = [sum(queries.reads), sum(candidates.reads)]
    found = measured(left, right, exchange)
    return found, once, queries.reads, candidates.reads


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_numbers_are_those_of_tensors_and_parts_are_read(ranks: int) -> None:
    queries, candidates = sides()
    left, right = (InMemory(table.rows.fused[table.valid]) for table in (queries, candidates))
    n, m = len(left), len(right)
    expected = measured(left, right, Local())
    for found, once, read, others in run_ranks(of_the_store, ranks, timeout=120):
        assert found.pop("ranks") == expected["ranks"]
        for name, value in found.items():
            assert value == pytest.approx(expected[name], abs=1e-9), name
        own = math.ceil(n / ranks)
        # Own queries for their pairs and for their tiles; all candidates a block of 16 queries
        assert once[0] <= 2 * own
        assert once[1] <= own + math.ceil(own / 16) * m
        # The sample of the clusters is in memory; the rest comes in tiles and chunks of pairs
        whole = sorted(read + others)[:-2]
        assert max(whole) <= 512 and min(n, m) < CANDIDATES


def test_chance_is_a_random_order() -> None:
    random = np.random.default_rng(0)
    rows = np.repeat(np.arange(40), random.integers(1, 4, 40))
    positives = Pairs.of(
        torch.from_numpy(rows), torch.from_numpy(random.integers(0, 30, len(rows)))
    )
    found = metrics.chance(positives, 30, [1, 10, 29, 100])
    counts = np.bincount(positives.rows.numpy())
    hits = {k: [] for k in (1, 10, 29)}  # type: dict[int, list[bool]]
    for count in counts:
        for _ in range(500):
            first = random.permutation(30)[:count].min()
            for k, told in hits.items():
                told.append(bool(first < k))
    for k, told in hits.items():
        assert found[f"chance/recall@{k}"] == pytest.approx(np.mean(told), abs=0.015)
    assert found["chance/recall@100"] == 1.0
