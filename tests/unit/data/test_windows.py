"""Risks: a window that shows what came after its target, an order that is not time's, a history
that holds its own target.
"""

from __future__ import annotations

import pytest

from sailplan.data.values import BadSample
from sailplan.data.windows import events, window

BODY = {
    "items": ["d", "a", "c", "x", "b"],
    "times": [4, 1, 3, 2.5, 2],
    "labels": [1, None, "buy", 0, 5],
}


def test_events_are_in_time_without_those_labelled_zero() -> None:
    assert events("r", BODY) == ["a", "b", "c", "d"]
    assert events("r", {"items": [0, "b"], "times": [0, 0]}) == [
        "0",
        "b",
    ]  # of one time, as they are listed
    assert events("r", {"items": ["b", "a"]}) == ["b", "a"]


def test_a_window_ends_before_its_target() -> None:
    found = [f"i{number}" for number in range(20)]
    targets = set()
    for seed in range(400):
        history, target = window("r", found, 5, seed)
        place = found.index(target)
        assert history == found[max(0, place - 5) : place] and history
        targets.add(target)
    assert targets == set(found[1:])
    assert window("r", found, 5, None) == (found[14:19], "i19")


def test_repeats_are_shown_once_and_never_the_target() -> None:
    assert window("r", ["a", "b", "a", "c", "a"], 10, None) == (["b", "c"], "a")
    assert window("r", ["a", "b", "a", "c"], 10, None) == (["b", "a"], "c")
    assert all(window("r", ["a", "a", "b"], 10, seed) == (["a"], "b") for seed in range(9))


@pytest.mark.parametrize("body", [
    {"items": ["a", "b"], "times": [1]},
    {"items": ["a", "b"], "times": [1, "soon"]},
    {"items": ["a", "b"], "times": [1, float("nan")]},
    {"items": ["a", "b"], "labels": [1]},
    {"items": ["a", "b"], "labels": 1},
])  # fmt: skip
def test_times_and_labels_that_do_not_fit_are_bad_samples(body: dict) -> None:
    with pytest.raises(BadSample):
        events("r", body)


def test_one_item_is_no_history() -> None:
    with pytest.raises(BadSample, match="2 different items"):
        window("r", ["a", "a"], 10, None)
