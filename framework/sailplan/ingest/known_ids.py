"""Which ids an items data set has: sorted 64-bit hashes in one mapped file, eight bytes an item,
shared by all processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sailplan.data.index import id_hash
from sailplan.ingest.work import STATE


def gather_ids(folder: Path, phase: str) -> tuple[Path, int]:
    """Merge the hashes that the parts of a phase left; return the file, and how many ids are
    there more than once.
    """
    parts = sorted((folder / STATE / phase).glob("*.ids.npy"))
    counts = [len(np.load(part, mmap_mode="r")) for part in parts]
    path = folder / STATE / f"{phase}.ids.npy"
    temporary = path.with_suffix(".tmp")
    merged = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(sum(counts),))
    start = 0
    for part, count in zip(parts, counts, strict=True):
        merged[start : start + count] = np.load(part)
        start += count
    merged.sort()
    twice = sum(int((block[1:] == block[:-1]).sum()) for block in _blocks(merged))
    merged.flush()
    del merged
    os.replace(temporary, path)
    return path, twice


def _blocks(values: np.ndarray, size: int = 1 << 20) -> list[np.ndarray]:
    """Views of neighbouring values that overlap by one."""
    return [values[start : start + size + 1] for start in range(0, len(values), size)]


class KnownIds:
    """Ask whether an id is there."""

    def __init__(self, path: Path) -> None:
        self._hashes = np.load(path, mmap_mode="r")

    def __contains__(self, name: str) -> bool:
        wanted = np.uint64(id_hash(name))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)
