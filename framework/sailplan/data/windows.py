"""A user's whole history in one record: `items`, with `times` and `labels` beside them; the
reader draws windows from it.

In training any event may be the target, and the items before it are the history; in evaluation it
is the last one. What comes after the target is never shown. An event whose label is 0 (shown and
not taken) is neither target nor history.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from sailplan.data.names import given
from sailplan.data.values import BadSample, ids, listed


def events(record_id: str, body: Mapping[str, object]) -> list[str]:
    """Return the item ids of a record's `items`, by their `times` (of one time, as they are
    listed), without those labelled 0.

    Raises BadSample for times or labels that are not as many as the items, and for times that are
    no finite numbers.
    """
    items = ids(record_id, body, "items")
    order = list(range(len(items)))
    if given(body.get("times")) is not None:
        times = listed(record_id, body, "times")
        _expect_as_many(record_id, "times", times, items)
        if not all(
            isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time)
            for time in times
        ):
            raise BadSample(record_id, "times has an entry that is no number, expected seconds")
        order.sort(key=times.__getitem__)
    labels = body.get("labels")
    if given(labels) is not None:
        if not isinstance(labels, list):
            raise BadSample(record_id, f"labels is a {type(labels).__name__}, expected a list")
        _expect_as_many(record_id, "labels", labels, items)
        order = [place for place in order if labels[place] is None or labels[place] != 0]
    return [items[place] for place in order]


def _expect_as_many(record_id: str, key: str, found: list[object], items: list[str]) -> None:
    if len(found) != len(items):
        raise BadSample(
            record_id, f"{key} has {len(found)} entries, expected {len(items)}, as many as items"
        )


def window(
    record_id: str, found: list[str], length: int, seed: int | None
) -> tuple[list[str], str]:
    """Return the history, at most `length` different items, most recent last, and the target, of
    events in the order of time.

    seed: draws the target among all events with something else before them; None: the last one.
    Raises BadSample for a history of one item.
    """
    first = next((place for place, item in enumerate(found) if item != found[0]), None)
    if first is None:
        raise BadSample(
            record_id,
            f"a history needs at least 2 different items in time; found {len(set(found))}",
        )
    place = len(found) - 1 if seed is None else random.Random(seed).randrange(first, len(found))
    target, history = found[place], dict[str, None]()
    for item in reversed(found[:place]):
        if len(history) == length:
            break
        if item != target:
            history[item] = None
    return list(history)[::-1], target
