"""Sorted record positions that nobody holds: a split's, or those of the ones in a bit field.

Both are asked as an array is, with a slice or with numbers, so that an array (in memory or mapped)
can take their place. What is listed at once is what was asked for.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sailplan.data.reader import RecordReader

BLOCK = 1 << 13  # bytes of a bit field whose ones are counted together


class Positions(Protocol):
    """Positions int64, rising; an array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice | NDArray[np.int64], /) -> NDArray[np.int64]: ...


def numbers_of(wanted: slice | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return what is asked of `count` things as their numbers, int64 [n]."""
    if isinstance(wanted, slice):
        return np.arange(*wanted.indices(count), dtype=np.int64)
    return np.asarray(wanted, dtype=np.int64)


class SplitPositions:
    """The positions of a split's records; None: of all records."""

    def __init__(self, reader: RecordReader, split: str | None) -> None:
        self._reader, self._split = reader, split
        self._count = len(reader) if split is None else reader.count(split)
        self.digest = f"split {split} of {reader.identity}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        numbers = numbers_of(wanted, len(self))
        return numbers if self._split is None else self._reader.select(self._split, numbers)


class PositionsPart:
    """Positions number start .. stop - 1 of others."""

    def __init__(self, whole: Positions, start: int, stop: int) -> None:
        self._whole, self._start, self._count = whole, start, stop - start
        self.digest = f"{start}..{stop} of {digest_of(whole)}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        return self._whole[numbers_of(wanted, self._count) + self._start]


class MarkedPositions:
    """The places of the ones among bits, first bit first: an eighth of a byte a record."""

    def __init__(self, bits: NDArray[np.uint8]) -> None:
        """bits: as np.packbits makes them."""
        self._bits = bits
        counts = [
            int(np.bitwise_count(bits[start : start + BLOCK]).sum(dtype=np.int64))
            for start in range(0, len(bits), BLOCK)
        ]
        self._upto = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.digest = f"marked {hashlib.sha256(bits.tobytes()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return int(self._upto[-1])

    def __getitem__(self, wanted: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        numbers = numbers_of(wanted, len(self))
        blocks = np.searchsorted(self._upto, numbers, side="right") - 1
        found = np.empty(len(numbers), dtype=np.int64)
        for block in np.unique(blocks).tolist():
            ones = np.flatnonzero(np.unpackbits(self._bits[block * BLOCK : (block + 1) * BLOCK]))
            here = blocks == block
            found[here] = 8 * BLOCK * block + ones[numbers[here] - self._upto[block]]
        return found


def digest_of(positions: Positions) -> str:
    """Return what names a selection: equal positions give equal names on all ranks and starts."""
    known = getattr(positions, "digest", None)
    if known is not None:
        return str(known)
    found = hashlib.sha256()
    for start in range(0, len(positions), 1 << 20):
        part = np.ascontiguousarray(positions[start : start + (1 << 20)], dtype=np.int64)
        found.update(part.tobytes())
    return f"list {found.hexdigest()[:16]}"
