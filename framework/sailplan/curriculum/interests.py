"""Four views of what a user is interested in, from timed events: which earlier items explain the
last one (recipe 4.2).

An event is (user, item, time, set of positive labels). The most recent positive item of a user is
the target of all views. Only events *before* it can be shown: not those of its own moment, and not
the target item itself. Of each earlier item a user's labels are put together; its behaviours are
the different labels among them.

| view                 | items with | of these                    | at most `length` of them             |
|----------------------|------------|-----------------------------|--------------------------------------|
| content_single       | 3 or more  | (a lowest similarity)       | most similar to the target           |
| content_multi        | 1 or more  | labels agree with target's  | the last ones                        |
| collaboration_single | 3 or more  | labels agree with target's  | label clusters in the proportions of |
|                      |            |                             | all of the user's earlier items      |
| collaboration_multi  | 1 or more  | all                         | clusters in proportion to their size |

"With 3 or more" are different behaviours. Labels agree where the Jaccard coefficient of the two
sets is above 0.5.
A label cluster is the items with the same set of labels. Proportions are those of Webster's method:
the k-th item of a cluster of weight w comes at (k - 1/2) / w. Everything here works on the arrays
of many whole users at once, and what a user gets depends on that user's events alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sailplan.data.config import INTEREST_VIEWS, InterestsConfig

Similarity = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]
"""Cosine of the items int64 [n] with the items int64 [n], pair by pair: float64 [n]."""
Assign = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Cluster of each item: int64 [n] -> int64 [n]."""


@dataclass(frozen=True)
class Events:
    """n events of whole users, in any order; rows of one user, item and time are one event."""

    users: NDArray[np.int64]  # [n] 0 .. number of users - 1
    items: NDArray[np.int64]  # [n]
    times: NDArray[np.int64]  # [n]
    labels: NDArray[np.uint64]  # [n] bits of the positive labels; 0: not a positive event


@dataclass(frozen=True)
class History:
    """The m (user, earlier item) pairs of u users, sorted by user and item, and each user's
    target.
    """

    users: NDArray[np.int64]  # [m]
    items: NDArray[np.int64]  # [m]
    times: NDArray[np.int64]  # [m] of the last event
    labels: NDArray[np.uint64]  # [m] of all the user's earlier events with the item
    targets: NDArray[np.int64]  # [u] -1: the user has no positive event
    target_labels: NDArray[np.uint64]  # [u]
    target_times: NDArray[np.int64]  # [u]

    def take(self, rows: NDArray[np.int64]) -> History:
        """Return the history with these pairs only."""
        own = (self.users[rows], self.items[rows], self.times[rows], self.labels[rows])
        return History(*own, self.targets, self.target_labels, self.target_times)


@dataclass(frozen=True)
class Sequences:
    """s sequences: the items of sequence i are items[starts[i] : starts[i + 1]], in time order."""

    views: NDArray[np.int8]  # [s] index into INTEREST_VIEWS
    users: NDArray[np.int64]  # [s]
    targets: NDArray[np.int64]  # [s]
    starts: NDArray[np.int64]  # [s + 1]
    items: NDArray[np.int64]


def history_of(events: Events, users: int, max_events: int) -> History:
    """Return targets and earlier items of users 0 ..

    users - 1, from the last `max_events` events of each.
    """
    order = np.lexsort((events.items, events.times, events.users))
    user, item, time, label = (
        events.users[order],
        events.items[order],
        events.times[order],
        events.labels[order],
    )
    first = _firsts(user, time, item)
    label = np.bitwise_or.reduceat(label, first) if len(first) else label
    user, item, time = user[first], item[first], time[first]
    ends = np.searchsorted(user, np.arange(users), side="right")
    kept = (ends[user] - np.arange(len(user)) <= max_events) & (label != 0)
    user, item, time, label = user[kept], item[kept], time[kept], label[kept]

    starts, ends = (
        np.searchsorted(user, np.arange(users), side=side) for side in ("left", "right")
    )  # type: ignore[call-overload]
    known = ends > starts
    targets, target_labels, target_times = (
        np.full(users, -1, dtype=np.int64),
        np.zeros(users, dtype=np.uint64),
        np.zeros(users, dtype=np.int64),
    )
    target_times[known] = time[ends[known] - 1]
    last = np.flatnonzero(time == target_times[user])
    place = last[
        np.unique(user[last], return_index=True)[1]
    ]  # of several in the same moment the first in the catalogue
    targets[known], target_labels[known] = item[place], label[place]
    earlier = (time < target_times[user]) & (item != targets[user])
    user, item, time, label = user[earlier], item[earlier], time[earlier], label[earlier]

    order = np.lexsort((time, item, user))
    user, item, time, label = user[order], item[order], time[order], label[order]
    first = _firsts(user, item)
    lasts = np.append(first[1:], len(user))[: len(first)] - 1
    label = np.bitwise_or.reduceat(label, first) if len(first) else label
    return History(
        user[first], item[first], time[lasts], label, targets, target_labels, target_times
    )


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return |both| / |either| of label sets [n], float64 [n]; 0 for two empty sets."""
    both, either = (
        np.bitwise_count(first & second).astype(np.float64),
        np.bitwise_count(first | second),
    )
    return both / np.maximum(either, 1)


def in_proportion(
    users: NDArray[np.int64],
    clusters: NDArray[np.int64],
    weights: NDArray[np.float64] | NDArray[np.int64],
    places: NDArray[np.int64],
    length: int,
) -> NDArray[np.int64]:
    """Return the rows chosen of each user [k], rising: at most `length`, from the user's
    clusters in proportion to their weights.

    All [n]: weights are equal within a user's cluster; places say which of a cluster's rows come
    first (lowest).
    """
    order = np.lexsort((places, clusters, users))
    numbers = np.empty(len(users), dtype=np.int64)
    numbers[order] = _counted(_firsts(users[order], clusters[order]), len(users))
    turns = (2 * numbers + 1) / weights
    order = np.lexsort((places, turns, users))
    counted = _counted(_firsts(users[order]), len(users))
    return np.sort(order[counted < length])


def interest_views(
    history: History,
    settings: InterestsConfig,
    length: int,
    *,
    similarity: Similarity,
    assign: Assign | None = None,
    seeds: NDArray[np.uint64],
) -> Sequences:
    """Return the sequences of the wanted views; a user who lacks what a view needs gives none in
    it.

    similarity: in content, for `content_single`; assign: content clusters, for clusters=content;
    seeds: uint64 [u] of the users, for draw=random.
    """
    behaviours = np.bitwise_count(history.labels)
    agrees = jaccard(history.labels, history.target_labels[history.users]) > settings.jaccard
    compact, wide = (
        behaviours >= settings.single_peak_behaviours,
        behaviours >= settings.multi_peak_behaviours,
    )
    draws = _draws(history, settings.draw, seeds)
    kinds = np.unique(history.labels, return_inverse=True)[1].astype(np.int64)
    every = np.zeros(len(kinds), dtype=np.int64)

    def chosen(view: str) -> NDArray[np.int64]:
        if view == "content_single":
            rows = np.flatnonzero(compact)
            near = similarity(history.items[rows], history.targets[history.users[rows]])
            if settings.content_similarity is not None:
                rows, near = (
                    rows[near >= settings.content_similarity],
                    near[near >= settings.content_similarity],
                )
            return _choose(history, rows, every, every + 1, _ranked(draws[rows], -near), length)
        if view == "content_multi":
            rows = np.flatnonzero(wide & agrees)
            return _choose(history, rows, every, every + 1, draws[rows], length)
        if view == "collaboration_single":
            rows = np.flatnonzero(compact & agrees)
            return _choose(history, rows, kinds, _sizes(history.users, kinds), draws[rows], length)
        rows = np.flatnonzero(wide)
        clusters = kinds
        if settings.clusters == "content":
            assert assign is not None, "content clusters need their assignment"
            clusters = assign(history.items)
        sizes = every.copy()
        sizes[rows] = _sizes(history.users[rows], clusters[rows])
        return _choose(history, rows, clusters, sizes, draws[rows], length)

    parts = [
        _sequences(history, chosen(view), INTEREST_VIEWS.index(view))
        for view in INTEREST_VIEWS
        if view in settings.views
    ]
    starts = np.cumsum(np.concatenate([[0], *(np.diff(part.starts) for part in parts)]))
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("views", "users", "targets", "items")
    }
    return Sequences(starts=starts.astype(np.int64), **joined)


# ---------------------------------------------------------------- parts
def _choose(
    history: History,
    rows: NDArray[np.int64],
    clusters: NDArray[np.int64],
    weights: NDArray[np.int64],
    places: NDArray[np.int64],
    length: int,
) -> NDArray[np.int64]:
    return rows[in_proportion(history.users[rows], clusters[rows], weights[rows], places, length)]


def _sequences(history: History, rows: NDArray[np.int64], view: int) -> Sequences:
    rows = rows[np.lexsort((history.items[rows], history.times[rows], history.users[rows]))]
    first = _firsts(history.users[rows])
    users = history.users[rows][first]
    views = np.full(len(users), view, dtype=np.int8)
    return Sequences(
        views, users, history.targets[users], np.append(first, len(rows)), history.items[rows]
    )


def _draws(history: History, draw: str, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return which of a user's items is drawn first (lowest): int64 [m], different for all."""
    if draw == "recent":
        return _ranked(history.items, -history.times)
    return _ranked(
        history.items, mixed(seeds[history.users] ^ mixed(history.items.astype(np.uint64)))
    )


def _ranked(*keys: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return the place of each row when they are sorted by the keys, the last key first."""
    place = np.empty(len(keys[0]), dtype=np.int64)
    place[np.lexsort(keys)] = np.arange(len(place))
    return place


def _sizes(users: NDArray[np.int64], clusters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many rows the user's cluster of each row has: int64 [n]."""
    order = np.lexsort((clusters, users))
    first = _firsts(users[order], clusters[order])
    lengths = np.diff(np.append(first, len(users)))
    sizes = np.empty(len(users), dtype=np.int64)
    sizes[order] = np.repeat(lengths, lengths)
    return sizes


def _firsts(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first row of each run of equal rows: int64 [runs]."""
    if not len(columns[0]):
        return np.empty(0, dtype=np.int64)
    changed = np.zeros(len(columns[0]) - 1, dtype=bool)
    for column in columns:
        changed |= column[1:] != column[:-1]
    return np.concatenate([[0], np.flatnonzero(changed) + 1]).astype(np.int64)


def _counted(first: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Return each row's number within its run: 0, 1, ... [rows]."""
    return np.arange(rows) - np.repeat(first, np.diff(np.append(first, rows)))


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed bits of each value, uint64 [n] (the finaliser of splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
