"""The elastic order: no record lost or doubled in any epoch, and the same stream however it is
cut.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan.data.order import keyed, permute, positions, uniform

shape = st.tuples(
    st.integers(1, 400),
    st.sampled_from([1, 2, 4, 6, 8, 24]),
    st.integers(1, 70),
    st.integers(1, 90),
)


@settings(max_examples=60, deadline=None)
@given(shape, st.integers(0, 2**62), st.integers(0, 50))
def test_every_epoch_reads_every_record_exactly_once(
    shape: tuple[int, int, int, int], seed: int, epoch: int
) -> None:
    size, lanes, segment, window = shape
    order = positions(11, size, seed, epoch * size, size, lanes, segment, window)
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(shape, st.lists(st.integers(0, 700), max_size=6))
def test_the_stream_does_not_depend_on_how_it_is_cut(
    shape: tuple[int, int, int, int], cuts: list[int]
) -> None:
    size, lanes, segment, window = shape
    whole = positions(5, size, 1, 0, 700, lanes, segment, window)
    edges = sorted({0, 700, *cuts})
    parts = [
        positions(5, size, 1, start, stop - start, lanes, segment, window)
        for start, stop in itertools.pairwise(edges)
    ]
    assert np.array_equal(whole, np.concatenate(parts))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, keyed(seed))), np.arange(size))


def test_permute_of_a_huge_range_stays_inside_and_keeps_values_apart() -> None:
    images = permute(np.arange(5000) * 99_999_999, 10**12, keyed(4))
    assert images.min() >= 0 and images.max() < 10**12 and len(set(images.tolist())) == 5000


def test_reading_is_sequential_within_segments_and_shuffled_between() -> None:
    order = positions(1, 4096, 0, 0, 4096, 8, 64, 128)
    for lane in range(8):
        window = np.sort(order[lane::8][:128])  # a window of two segments
        assert (np.diff(window) == 1).sum() >= 126
    assert not np.array_equal(order, positions(1, 4096, 0, 4096, 4096, 8, 64, 128)), "epochs differ"
    assert not np.array_equal(order, positions(2, 4096, 0, 0, 4096, 8, 64, 128)), "data sets differ"


def test_neither_epochs_nor_single_places_are_favoured() -> None:
    rows = np.arange(4096)
    correlations = [
        np.corrcoef(rows, positions(1, 4096, 0, epoch * 4096, 4096, 8, 64, 128))[0, 1]
        for epoch in range(40)
    ]
    assert (
        abs(np.mean(correlations)) < 0.1
    )  # 64 segments: a standard deviation of 0.125 each, 0.02 for the mean
    counts = np.zeros((7, 7))
    for key in range(1000):
        counts[np.arange(7), permute(np.arange(7), 7, keyed(key))] += 1
    assert ((counts - 1000 / 7) ** 2 / (1000 / 7)).sum() < 75, (
        "chi-square with 36 degrees of freedom; 75 has p < 0.001"
    )


def test_far_rows_cost_no_more_than_near_ones() -> None:
    far = positions(1, 10**10, 0, 10**14, 64, 8, 64, 512)
    assert far.min() >= 0 and far.max() < 10**10 and len(set(far.tolist())) == 64


def test_uniform_numbers_are_uniform() -> None:
    draws = uniform(3, np.arange(20_000))
    assert abs(draws.mean() - 0.5) < 0.01 and np.histogram(draws, 10, (0, 1))[0].min() > 1800


def test_the_order_of_released_versions_is_frozen() -> None:
    """A run resumed after an upgrade must go on with the same records."""
    assert positions(5, 1709, 1, 0, 12, 8, 64, 512).tolist() == [
        319,
        572,
        431,
        993,
        158,
        1373,
        1544,
        334,
        288,
        528,
        1177,
        1144,
    ]
