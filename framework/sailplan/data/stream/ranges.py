"""Which bytes are asked for in one request, and which are known to be on disk."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

WASTE = 1 / 8  # of the bytes that are needed: so much may lie between them in one request
SMALL_GAP = 4096  # bytes between two members that always join: the tar's headers
LARGEST = 32 << 20  # bytes of one request, unless a member alone has more
OVERLAPPING = 4  # ranges before a place that are looked at
MOST_KNOWN = 8192  # ranges of a shard

Range = tuple[int, int]  # first byte, byte after the last


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges that cover these with as few requests as are worth it, rising.

    All become one where what lies between them is little beside them; else those that lie close.
    """
    apart: list[list[int]] = []
    for start, stop in sorted(ranges):
        if apart and start <= apart[-1][1]:
            apart[-1][1] = max(apart[-1][1], stop)
        elif stop > start:
            apart.append([start, stop])
    if not apart:
        return []
    needed = sum(stop - start for start, stop in apart)
    between = apart[-1][1] - apart[0][0] - needed
    gap = between if between <= WASTE * needed else SMALL_GAP
    result = [apart[0]]
    for start, stop in apart[1:]:
        if start - result[-1][1] <= gap and stop - result[-1][0] <= LARGEST:
            result[-1][1] = stop
        else:
            result.append([start, stop])
    return [(start, stop) for start, stop in result]


class KnownRanges:
    """Ranges of one shard that were asked for, by what they cover."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._read: set[Range] = set()

    def add(self, one: Range) -> None:
        """Remember that a range was asked for."""
        self._read.discard(one)
        place = bisect.bisect_left(self._ranges, one)
        if self._ranges[place : place + 1] != [one]:
            if len(self._ranges) >= MOST_KNOWN:
                self._ranges, self._read, place = [], set(), 0
            self._ranges.insert(place, one)

    def was_read(self, one: Range) -> None:
        """Remember that a range was there."""
        self._read.add(one)

    def is_gone(self, one: Range) -> bool:
        """Forget a range that was there and is not any more; False: it is still on its way."""
        if one not in self._read:
            return False
        self._read.discard(one)
        place = bisect.bisect_left(self._ranges, one)
        if self._ranges[place : place + 1] == [one]:
            del self._ranges[place]
        return True

    def covering(self, start: int, stop: int) -> Range | None:
        """Return the shortest of the known ranges about a place that holds start .. stop - 1."""
        place = bisect.bisect_right(self._ranges, (start, 1 << 62))
        found = [one for one in self._ranges[max(0, place - OVERLAPPING) : place] if one[1] >= stop]
        return min(found, key=lambda one: one[1] - one[0], default=None)
