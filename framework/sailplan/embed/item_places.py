"""Which item of the catalogue each pair names, found by all ranks and kept on disk.

    FOLDER/0000012.npy    int64: the catalogue's positions of the twelfth part of the pairs; -1: none

A rank reads its own parts' records, and parts that are there are not read again. Beside them every
rank has one bit an item of the catalogue.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.data.reader import RecordReader
from sailplan.embed.selection import MarkedPositions, Positions, numbers_of
from sailplan.runtime.arrays import save
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import any_over_ranks, in_turns
from sailplan.runtime.watch import alone

PART = 1 << 14  # pairs: some seconds of reading
TOGETHER = 1 << 26  # items whose marks are put together at once, a byte each


class ItemPlaces:
    """The catalogue's position of the item of each pair; asked as an array of int64 [n] is."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self._folder, self._count, self._size = folder, count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        numbers = numbers_of(wanted, self._count)
        parts, found = numbers // self._size, np.empty(len(numbers), dtype=np.int64)
        for part in np.unique(parts).tolist():
            here = parts == part
            found[here] = np.load(self.path(part))[numbers[here] - part * self._size]
        return found

    def path(self, part: int) -> Path:
        return self._folder / f"{part:07d}.npy"


def find_items(
    parallel: Parallel, reader: RecordReader, positions: Positions, key: str, folder: Path
) -> tuple[ItemPlaces, MarkedPositions, bool]:
    """Return the places of what pairs name under `key` (item | query), the items that any names,
    and whether all name a known one. Collective.
    """
    assert reader.catalogue is not None, "pairs that name items have a catalogue"
    size = max(1, min(PART, -(-len(positions) // parallel.world_size)))
    folder = folder / f"{size}"  # of each part: other numbers of ranks may cut otherwise
    places = ItemPlaces(folder, len(positions), size)
    bits = np.zeros(-(-len(reader.catalogue) // 8), dtype=np.uint8)
    lacking = np.zeros(1, dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)

    def look(part: int) -> None:
        path = places.path(part)
        if not path.is_file():
            found = []
            for position in positions[part * size : (part + 1) * size].tolist():
                item = reader.find_item(reader.body(position).get(key))
                found.append(-1 if item is None else item)
                alone()
            save(path, np.array(found, dtype=np.int64))
        named = np.unique(np.load(path))
        lacking[0] |= len(named) == 0 or named[0] < 0
        named = named[named >= 0]
        np.bitwise_or.at(bits, named >> 3, (128 >> (named & 7)).astype(np.uint8))

    in_turns(parallel, f"items of {reader.name}", range(-(-len(positions) // size)), look)
    for start in range(0, len(bits), TOGETHER // 8):
        part = slice(start, start + TOGETHER // 8)
        bits[part] = np.packbits(any_over_ranks(np.unpackbits(bits[part])))
    return places, MarkedPositions(bits), not any_over_ranks(lacking)[0] and len(positions) > 0
