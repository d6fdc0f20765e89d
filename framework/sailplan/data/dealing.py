"""Which rank encodes which row of a step, and into how many micro-batches: pure functions of the
rows' foreseen costs.

All ranks foresee the same costs, so they agree without a message. Every rank gets equally many
rows, or one more where their number does not divide, and nearly equal sums of costs: rows are dealt
from the most costly on, each to the rank that has least so far and still has room (Graham's rule of
the longest processing time, with a limit of rows).
Rows of equal costs are dealt as cards are: rank r gets r, r + R, r + 2R, ...

Micro-batches of a view hold neighbours in the order of costs, so that they are of nearly equal
length. Their number is that of the rank that needs most of them under the budget; a rank then cuts
its real rows into so many parts, as evenly as it can.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

SORTED_TOGETHER = 64  # batches of a rank
Integers = NDArray[np.int64]


def deal(costs: Integers, ranks: int, loads: Integers | None = None) -> Integers:
    """Return the rank of each row: costs int64 [n] -> int64 [n] with n / ranks of each, rounded
    down or up.

    loads: int64 [ranks] what the ranks have already; grows by what they get.
    """
    loads = np.zeros(ranks, dtype=np.int64) if loads is None else loads
    owners = np.zeros(len(costs), dtype=np.int64)
    if ranks > 1:
        room, longer = divmod(len(costs), ranks)  # so many ranks have room for one row more
        least = [(load, 0, rank) for rank, load in enumerate(loads.tolist())]
        heapq.heapify(least)
        for row, cost in zip(*(values.tolist() for values in _falling(costs)), strict=True):
            load, taken, rank = least[0]
            owners[row] = rank
            longer -= taken == room
            if taken + 1 < room + (longer > 0):
                heapq.heapreplace(least, (load + cost, taken + 1, rank))
            else:
                heapq.heappop(least)
            while (
                longer == 0 and least and least[0][1] == room
            ):  # the rows that are left belong to those with fewer
                heapq.heappop(least)
    np.add.at(loads, owners, costs)
    return owners


def _falling(costs: Integers) -> tuple[Integers, Integers]:
    """Rows and costs from the most costly on, equal ones in order."""
    order = np.argsort(-costs, kind="stable")
    return order, costs[order]


def micro_batches_needed(
    costs: Integers, rows: int, budget: int, counts: Integers | None = None
) -> int:
    """Return into how many micro-batches all ranks cut a view: costs int64 [ranks, s] of their
    rows of it.

    counts: int64 [ranks] rows of each rank, the rest of its line being no rows (None: all are).
    rows: the most that a micro-batch may have. budget: the most that its costs may add up to (0:
    any sum); a row that alone costs more has a micro-batch of its own.
    """
    ranks, count = costs.shape
    if not budget:
        return -(-count // rows)
    present = (
        np.ones_like(costs, dtype=bool)
        if counts is None
        else np.arange(count)[None] < counts[:, None]
    )
    # What is no row comes first in the order, costs nothing and takes no room.
    costs = np.where(present, costs, -1)
    rising = np.sort(costs, axis=1)
    parts, held, filled = (
        np.ones(ranks, dtype=np.int64),
        np.zeros(ranks, dtype=np.int64),
        np.zeros(ranks, dtype=np.int64),
    )
    for column in rising.T:
        real = column >= 0
        full = ((held == rows) | ((filled + column > budget) & (held > 0))) & real
        parts += full
        held, filled = (
            np.where(full, 0, held) + real,
            np.where(full, 0, filled) + np.maximum(column, 0),
        )
    return int(parts.max())


def cut(costs: Integers, parts: int, rows: int) -> list[slice]:
    """Return `parts` slices of rows in rising order of costs int64 [s], at most `rows` each, the
    most costly as cheap as can be.

    Needs s <= parts * rows. None is empty unless there are fewer rows than parts: then the last
    ones are.
    """
    count = len(costs)
    assert count <= parts * rows, f"{count} rows into {parts} micro-batches of at most {rows}"
    if count < parts:
        return [slice(min(part, count), min(part + 1, count)) for part in range(parts)]
    upto = np.concatenate([[0], np.cumsum(costs)])
    low, high = int(max(costs[-1], -(-upto[-1] // parts))), int(upto[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_filled(upto, middle, rows)) <= parts else (middle + 1, high)
        )
    starts = _filled(upto, high, rows)
    while len(starts) < parts:  # fewer suffice: the one with most rows gives half of them
        sizes = np.diff([*starts, count])
        widest = int(sizes.argmax())
        starts.insert(widest + 1, starts[widest] + int(sizes[widest]) // 2)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def sorted_batches(
    costs: Integers, ranks: int, rows: int, budget: int, together: int = SORTED_TOGETHER
) -> list[list[Integers]]:
    """Return each rank's batches of rows that need no particular order: costs int64 [n] -> for
    each rank arrays of row numbers.

    A batch holds neighbours in the order of costs, at most `rows` and, but for a single row,
    `budget` (0: any). As many rows as `together` full batches of every rank are sorted together;
    further ones wait, for reading stays near to the order of the shards. Ranks have equally many
    batches, but for the last ones where rows are fewer than ranks.
    """
    result: list[list[Integers]] = [[] for _ in range(ranks)]
    window = together * rows * ranks
    for first in range(0, len(costs), window):
        part = costs[first : first + window]
        rising = np.argsort(part, kind="stable")
        needed = micro_batches_needed(part[None], rows, budget)
        even = min(len(part), -(-needed // ranks) * ranks)
        for number, chosen in enumerate(cut(part[rising], even, rows)):
            result[number % ranks].append(first + np.sort(rising[chosen]))
    return result


def _filled(upto: Integers, most: int, rows: int) -> list[int]:
    """Starts of parts that are filled one after the other up to a cost and a number of rows."""
    starts, count = [0], len(upto) - 1
    while True:
        stop = min(
            int(np.searchsorted(upto, upto[starts[-1]] + most, side="right")) - 1, starts[-1] + rows
        )
        if stop >= count:
            return starts
        starts.append(max(stop, starts[-1] + 1))
