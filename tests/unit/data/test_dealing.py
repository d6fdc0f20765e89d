"""Risks: ranks with more rows than others, a lost row, unbalanced ranks, a micro-batch over the
budget, numbers that differ between ranks.
"""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest

from sailplan.data.dealing import cut, deal, micro_batches_needed, sorted_batches


def random_costs(seed: int, count: int, heavy: bool = True) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(2, 1.0 if heavy else 0.2, count)
    return np.maximum(1, drawn).astype(np.int64)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_rank_gets_as_many_rows_and_nearly_as_much_to_do(ranks: int) -> None:
    costs = random_costs(ranks, 64 * 3 * 32)
    owners = deal(costs, ranks)
    assert np.bincount(owners, minlength=ranks).tolist() == [len(costs) // ranks] * ranks
    loads = np.bincount(owners, weights=costs, minlength=ranks)
    assert loads.max() <= 1.02 * loads.mean()
    by_lanes = np.bincount(np.arange(len(costs)) % ranks, weights=costs, minlength=ranks)
    assert ranks < 8 or by_lanes.max() > 1.06 * by_lanes.mean(), "the costs were unbalanced"


def test_a_row_that_alone_is_most_of_a_rank_gets_the_shortest_beside_it() -> None:
    costs = np.concatenate([[900], random_costs(2, 255, heavy=False)])
    owners = deal(costs, 8)
    loads = np.bincount(owners, weights=costs, minlength=8)
    assert (
        loads.max() == 900 + np.sort(costs)[:31].sum() and np.bincount(owners).tolist() == [32] * 8
    ), "no split with equal numbers of rows is better"


def test_rows_of_equal_costs_are_dealt_lane_by_lane() -> None:
    assert (
        deal(np.full(24, 7), 4).tolist() == [*range(4)] * 6
        and deal(np.zeros(24, dtype=np.int64), 4).tolist() == [*range(4)] * 6
    )


def test_dealing_65536_rows_to_2048_ranks_takes_one_step_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    replace, pop = heapq.heapreplace, heapq.heappop
    monkeypatch.setattr(
        heapq, "heapreplace", lambda heap, entry: (calls.append(1), replace(heap, entry))[1]
    )
    monkeypatch.setattr(heapq, "heappop", lambda heap: (calls.append(1), pop(heap))[1])
    costs = random_costs(3, 65536, heavy=False)
    loads = np.bincount(deal(costs, 2048), weights=costs, minlength=2048)
    assert len(calls) == 65536 and loads.max() < 1.02 * loads.mean()


def test_parts_of_a_step_even_each_other_out() -> None:
    loads = np.zeros(4, dtype=np.int64)
    for seed in range(3):
        before = loads.copy()
        costs = random_costs(seed, 8)
        owners = deal(costs, 4, loads)
        assert np.array_equal(
            loads - before, np.bincount(owners, weights=costs, minlength=4).astype(np.int64)
        )
    alone = sum(
        np.bincount(deal(random_costs(seed, 8), 4), weights=random_costs(seed, 8), minlength=4)
        for seed in range(3)
    )
    assert loads.max() < alone.max()  # type: ignore[union-attr]


def test_a_cut_is_the_best_there_is() -> None:
    for seed, parts in itertools.product(range(12), (1, 2, 3, 4)):
        costs = np.sort(random_costs(seed, 9))
        for rows in (9, 4, 3):
            if parts * rows < 9:
                continue
            found = cut(costs, parts, rows)
            assert [row for part in found for row in range(part.start, part.stop)] == list(
                range(9)
            ) and len(found) == parts
            assert all(0 < part.stop - part.start <= rows for part in found)
            best = min(
                max(costs[a:b].sum() for a, b in zip([0, *inner], [*inner, 9], strict=True))
                for inner in itertools.combinations(range(1, 9), parts - 1)
                if all(b - a <= rows for a, b in zip([0, *inner], [*inner, 9], strict=True))
            )
            assert max(costs[part].sum() for part in found) == best


@pytest.mark.parametrize(
    ("rows", "budget"), [(32, 0), (5, 0), (32, 200), (32, 60), (7, 60), (32, 1)]
)
def test_the_number_of_micro_batches_fits_the_rank_that_needs_most(rows: int, budget: int) -> None:
    costs = random_costs(5, 8 * 32).reshape(8, 32)
    needed = micro_batches_needed(costs, rows, budget)
    sums = [costs[rank].sum() for rank in range(8)]
    assert needed >= max(-(-32 // rows), min(32, -(-max(sums) // budget)) if budget else 0)
    for own in costs:
        parts = cut(np.sort(own), needed, rows)
        assert len(parts) == needed and all(part.stop - part.start <= rows for part in parts)
        assert not budget or max(np.sort(own)[part].sum() for part in parts) <= max(
            budget, own.max()
        )


@pytest.mark.parametrize(
    ("count", "ranks", "together"),
    [(1000, 4, 64), (1000, 4, 2), (3, 4, 64), (0, 2, 64), (1, 1, 64)],
)
def test_sorted_batches_hold_every_row_once_in_equally_many_forward_passes(
    count: int, ranks: int, together: int
) -> None:
    costs = random_costs(1, count)
    shares = sorted_batches(costs, ranks, 32, 400, together)
    assert sorted(int(row) for own in shares for batch in own for row in batch) == list(
        range(count)
    )
    lengths = [len(own) for own in shares]
    assert max(lengths) - min(lengths) <= (1 if count < ranks else 0)
    assert all(
        len(batch) <= 32 and (costs[batch].sum() <= 400 or len(batch) == 1)
        for own in shares
        for batch in own
    )
    if together == 2:
        spans = [int(batch.max() - batch.min()) for own in shares for batch in own]
        assert max(spans) < 2 * 32 * ranks, "reading stays near to the order of the shards"
    if count == 1000 and together == 64:
        padded = sum(len(batch) * costs[batch].max() for own in shares for batch in own)
        assert padded < 1.15 * costs.sum()
