"""Tiled search equals brute force, ties and thresholds included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan_kernels import EXCHANGES, rank_of, topk
from sailplan_kernels.testing import run_ranks


def integers(seed: int, *shape: int) -> torch.Tensor:
    """Small whole numbers: dot products are exact in any order, and ties abound."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 17),
    st.booleans(),
    st.booleans(),
)
def test_topk_equals_sorting(seed, n, m, k, tile, threshold, exclude):
    q, keys = integers(seed, n, 3), integers(seed + 1, m, 3)
    scores = q @ keys.T
    options = {}
    if threshold:
        options["max_score"] = 3.0
        scores = scores.masked_fill(scores >= 3.0, -torch.inf)
    if exclude:
        generator = torch.Generator().manual_seed(seed)
        options["key_ids"] = torch.randint(0, 10, (m,), generator=generator)
        options["exclude_ids"] = torch.randint(-1, 10, (n, 3), generator=generator)
        scores[(options["exclude_ids"][:, :, None] == options["key_ids"]).any(1)] = -torch.inf
    scores = torch.cat([scores, torch.full((n, k), -torch.inf)], 1)
    expected, index = scores.sort(dim=1, descending=True, stable=True)
    expected, index = expected[:, :k], index[:, :k].masked_fill(expected[:, :k].isinf(), -1)
    found, found_index = topk(q, keys, k, tile=tile, normalize=False, **options)
    assert torch.equal(found, expected) and torch.equal(found_index, index)


def test_topk_of_cosines_equals_torch():
    g = torch.Generator().manual_seed(0)
    q, keys = torch.randn(50, 16, generator=g), torch.randn(300, 16, generator=g)
    expected = (torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(keys).T).topk(10)
    scores, index = topk(q, keys, 10, tile=64)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(index, expected.indices)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_topk_excludes_by_index_without_ids():
    x = torch.randn(20, 8)
    _, index = topk(x, x, 5, exclude_ids=torch.arange(20)[:, None], tile=7)
    assert not (index == torch.arange(20)[:, None]).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40), st.integers(1, 17))
def test_rank_equals_position_in_a_stable_sort(seed, n, m, tile):
    g = torch.Generator().manual_seed(seed)
    q, keys = integers(seed, n, 3), integers(seed + 1, m, 3)
    order = (q @ keys.T).sort(dim=1, descending=True, stable=True).indices
    place = order.argsort(dim=1)  # where each key stands
    counts = torch.randint(0, 4, (n,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    index = torch.randint(0, m, (int(offsets[-1]),), generator=g)
    expected = [
        min((int(place[i, j]) for j in index[offsets[i] : offsets[i + 1]]), default=-1)
        for i in range(n)
    ]
    assert (
        rank_of(q, keys, index, positive_offsets=offsets, tile=tile, normalize=False).tolist()
        == expected
    )
    one = torch.randint(0, m, (n,), generator=g)
    assert torch.equal(
        rank_of(q, keys, one, tile=tile, normalize=False), place.gather(1, one[:, None])[:, 0]
    )


@pytest.mark.parametrize("tile", [3, 16, 1000])
def test_positive_ties_with_itself_only_whatever_the_tile(tile):
    """The positive's score must come from the same product as the others', or rounding gives
    rank 1 for rank 0.
    """
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 48, generator=g)
    assert (rank_of(keys + 1e-3, keys, torch.arange(200), tile=tile) == 0).all()


def test_search_in_half_precision_inputs():
    x = torch.randn(12, 8).bfloat16()
    scores, index = topk(x, x, 1)
    assert scores.dtype is torch.float32
    assert torch.equal(index[:, 0], torch.arange(12))


SHARDS = {
    1: ((9,), (40,)),
    2: ((5, 4), (33, 7)),
    4: ((5, 0, 3, 1), (0, 11, 20, 9)),
    3: ((2, 0, 3), (0, 0, 0)),
}


@pytest.mark.parametrize("world_size", SHARDS)
def test_ranks_find_what_one_process_finds(world_size):
    """Of any exchange, and the same ones: ties on purpose, and cosines of float64; some ranks
    have no queries or no keys.
    """
    rows, columns = SHARDS[world_size]
    n, m, g = sum(rows), sum(columns), torch.Generator().manual_seed(world_size)
    whole = {"queries": integers(1, n, 3), "keys": integers(2, m, 3)}
    float64 = {
        "queries": torch.randn(n, 24, generator=g).double(),
        "keys": torch.randn(m, 24, generator=g).double(),
    }
    key_ids, exclude_ids = (
        torch.randint(0, 10, (m,), generator=g),
        torch.randint(-1, 10, (n, 3), generator=g),
    )
    by_index = torch.randint(-1, max(m, 1), (n, 2), generator=g)
    calls = [
        (whole, {"normalize": False}),
        (
            whole,
            {"normalize": False, "max_score": 3.0, "key_ids": key_ids, "exclude_ids": exclude_ids},
        ),
        (whole, {"normalize": False, "exclude_ids": by_index}),
        (float64, {"max_score": 0.4, "key_ids": key_ids, "exclude_ids": exclude_ids}),
    ]

    def cut(name, x, rank):
        return (
            x.split(columns if name in ("keys", "key_ids") else rows)[rank]
            if isinstance(x, torch.Tensor)
            else x
        )

    def work(rank, _):
        found = []
        for exchange in EXCHANGES.values():
            for vectors, options in calls:
                mine = {name: cut(name, x, rank) for name, x in {**vectors, **options}.items()}
                found.append(topk(**mine, k=12, tile=5, exchange=exchange()))
        return found

    expected = [topk(**vectors, **options, k=12, tile=7) for vectors, options in calls]
    assert m == 0 or any((index >= 0).any() for _, index in expected)
    for i, parts in enumerate(zip(*run_ranks(work, world_size), strict=True)):
        for found, right in zip(zip(*parts, strict=True), expected[i % len(calls)], strict=True):
            if (
                right.dtype is torch.int64 or calls[i % len(calls)][0] is whole
            ):  # places, and products of small integers, are exact
                assert torch.equal(torch.cat(found), right)
            # Rounded once to float32, of float64 sums whose last bit may differ with the shape of a
            # tile
            else:
                torch.testing.assert_close(torch.cat(found), right, rtol=2**-23, atol=0)


def test_ranks_asked_differently_are_an_error_not_a_hang():
    def work(rank, _):
        with pytest.raises(ValueError, match="topk: ranks differ"):
            topk(torch.ones(2, 3), torch.ones(2, 3), 1 + rank, exchange=EXCHANGES["ring"]())

    run_ranks(work, 2, timeout=20)
