"""Sequences of unordered sets, teachers and co-occurrence pairs: nothing of held-out users,
every rule does what it says.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from sailplan.curriculum.histories import Histories
from sailplan.curriculum.teachers import co_occurrence, factorise, pair_records
from sailplan.curriculum.unordered import RULES, in_proportion, jaccard_to, records, sequences
from sailplan.errors import BadDataError


def two_worlds(users: int = 12, items: int = 30) -> tuple[Histories, np.ndarray, np.ndarray]:
    """Users of the first half use even catalogue positions, the others odd ones; content
    separates low from high.
    """
    random = np.random.default_rng(0)
    histories = [
        random.permutation(np.arange(user % 2, items, 2))[:13].tolist() for user in range(users)
    ]
    found = Histories([f"u{user}" for user in range(users)], histories, 0)
    used = found.used()
    content = np.stack(
        [used < items // 2, used >= items // 2], axis=1
    ) + 0.05 * random.standard_normal((len(used), 2))
    return found, used, content


def test_sequences_stay_within_a_user_and_never_show_the_target() -> None:
    histories, used, content = two_worlds()
    found = sequences(histories, used, content, length=5, targets=3)
    owner = dict(zip(histories.users, histories.items, strict=True))
    for sequence in found:
        assert sequence["target"] not in sequence["history"]
        assert set(sequence["history"]) | {sequence["target"]} <= set(owner[sequence["user"]])
        assert 1 <= len(sequence["history"]) <= 5
    assert {sequence["rule"] for sequence in found} == set(RULES)
    assert len({(frozenset(s["history"]), s["target"]) for s in found}) == len(found)
    assert found == sequences(histories, used, content, length=5, targets=3)


def test_the_nearest_rule_takes_the_items_most_like_the_target() -> None:
    histories, used, content = two_worlds()
    for sequence in sequences(histories, used, content, length=3):
        if sequence["rule"] == "content_nearest":
            assert {item < 15 for item in sequence["history"]} == {sequence["target"] < 15}


def test_clusters_follow_cluster_sizes() -> None:
    labels = np.array([0] * 12 + [1] * 6 + [2] * 2)
    chosen = in_proportion(labels, 10, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [6, 3, 1]
    assert in_proportion(labels[:4], 10, np.random.default_rng(0)).tolist() == [0, 1, 2, 3]


def test_jaccard_equals_sets_of_users() -> None:
    histories, used, _ = two_worlds()
    users = [
        {user for user, items in enumerate(histories.items) if place in items} for place in used
    ]
    found = jaccard_to(histories.matrix(used).tocsc(), 3, np.arange(len(used)))
    assert found == pytest.approx(
        [len(users[3] & other) / len(users[3] | other) for other in users]
    )


@pytest.mark.parametrize("teacher", ["svd", "nmf"])
def test_teachers_put_items_of_the_same_users_together(teacher: str) -> None:
    histories, used, _ = two_worlds()
    factors = factorise(histories.matrix(used), teacher, 2)
    cosines = factors @ factors.T
    same = (used[:, None] % 2) == (used % 2)
    assert cosines[same].mean() > cosines[~same].mean() + 0.5
    assert np.array_equal(factors, factorise(histories.matrix(used), teacher, 2))


def test_co_occurrence_equals_brute_force() -> None:
    random = np.random.default_rng(1)
    histories = Histories(
        [str(user) for user in range(20)],
        [random.permutation(15)[: random.integers(2, 5)].tolist() for _ in range(20)],
        0,
    )
    used = histories.used()
    users = [
        {user for user, items in enumerate(histories.items) if place in items} for place in used
    ]
    wanted = {}
    for first, second in itertools.combinations(range(len(used)), 2):
        both = len(users[first] & users[second])
        if both >= 2 and both * 20 > len(users[first]) * len(users[second]):
            wanted[first, second] = both / len(users[first] | users[second])
    pairs, scores = co_occurrence(histories.matrix(used), per_item=100)
    assert dict(zip(map(tuple, pairs.tolist()), scores.tolist(), strict=True)) == pytest.approx(
        wanted
    )
    fewer, _ = co_occurrence(histories.matrix(used), per_item=1)
    assert len(fewer) < len(pairs) and set(fewer.ravel()) == set(pairs.ravel())
    body = pair_records(pairs, scores, [f"x/{place}" for place in used])[0]
    assert body["query"] != body["item"] and 0 < body["score"] <= 1


def test_no_overlap_is_a_clear_error() -> None:
    histories = Histories(["a", "b"], [[0, 1], [2, 3]], 0)
    with pytest.raises(BadDataError, match="share 2 training users"):
        co_occurrence(histories.matrix(histories.used()))


def test_records_name_items_by_id() -> None:
    histories, used, content = two_worlds()
    bodies = records(
        sequences(histories, used, content), {int(place): f"set/{place}" for place in used}
    )
    assert len({body["id"] for body in bodies}) == len(bodies)
    assert all(body["view"] == "unordered" for body in bodies)
    assert all(body["split"] == "train" and body["target"].startswith("set/") for body in bodies)
    counts = Counter(body["target"] for body in bodies)
    assert all(
        body["target_probability"] == pytest.approx(counts[body["target"]] / len(bodies))
        for body in bodies
    )


def test_records_bring_random_items_that_nobody_uses() -> None:
    histories, used, content = two_worlds()
    found, ids = sequences(histories, used, content), {int(place): f"set/{place}" for place in used}
    unused = [f"set/{place}" for place in range(1000, 1020)]
    bodies = records(found, ids, negatives=3, unused=unused, seed=1)
    drawn = Counter(name for body in bodies for name in body["negatives"])
    assert set(drawn) == set(unused) and all(
        len(body["negatives"]) == 3 and body["negative_probability"] == 1 / 20 for body in bodies
    )
    assert (
        bodies
        == records(found, ids, negatives=3, unused=unused, seed=1)
        != records(found, ids, negatives=3, unused=unused, seed=2)
    )
    assert all("negatives" not in body for body in records(found, ids, negatives=3))
