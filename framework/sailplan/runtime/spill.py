"""Rows of integers that all ranks sort into buckets, through files: a join of more rows than fit.

Each rank appends its rows, a chunk at a time and sorted by bucket, to one file of its own. A bucket
is read back from the pieces in every rank's file, so that the ranks share the buckets' work.

    FOLDER/rank-00000.bin    int64 rows, chunk after chunk
    FOLDER/rank-00000.npy    int64 [chunks, buckets + 1]: where each bucket begins in a chunk

What it costs: a rank holds a chunk or a bucket; every row is written once and read once; W files,
each opened once for every bucket.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
ODD = np.uint64(0x9E3779B97F4A7C15)


def bucket_of(keys: Integers, buckets: int) -> Integers:
    """Return the bucket of each key int64 [n]: equal keys share one, at any number of ranks."""
    mixed = (keys.astype(np.uint64) * ODD) >> np.uint64(33)
    return (mixed % np.uint64(buckets)).astype(np.int64)


class Spill:
    """This rank's file; `Spill.read` has a bucket of all ranks' files."""

    def __init__(self, folder: Path, rank: int, buckets: int, width: int) -> None:
        """width: integers of a row. A file that an earlier start left is written anew."""
        folder.mkdir(parents=True, exist_ok=True)
        self._stem, self.buckets, self.width = folder / f"rank-{rank:05d}", buckets, width
        self._file = open(f"{self._stem}.bin", "wb")  # noqa: SIM115  open until `close`
        self._starts: list[Integers] = []
        self._rows = 0

    def add(self, keys: Integers, rows: Integers) -> None:
        """Append a chunk: keys int64 [n] say which bucket each of the rows int64 [n, width] is
        of.
        """
        buckets = bucket_of(keys, self.buckets)
        order = np.argsort(buckets, kind="stable")
        self._file.write(np.ascontiguousarray(rows[order], dtype=np.int64).tobytes())
        bounds = np.searchsorted(buckets[order], np.arange(self.buckets + 1))
        self._starts.append(bounds + self._rows)
        self._rows += len(rows)

    def close(self) -> None:
        """End the file: all ranks do before any reads."""
        self._file.close()
        starts = np.array(self._starts, dtype=np.int64).reshape(-1, self.buckets + 1)
        np.save(f"{self._stem}.npy", starts)

    @staticmethod
    def read(folder: Path, ranks: int, bucket: int, width: int) -> Integers:
        """Return the rows int64 [n, width] of a bucket, in the order of ranks and chunks."""
        parts = [np.empty((0, width), dtype=np.int64)]
        for rank in range(ranks):
            stem = folder / f"rank-{rank:05d}"
            starts = np.array(np.load(f"{stem}.npy", mmap_mode="r")[:, bucket : bucket + 2])
            with open(f"{stem}.bin", "rb") as file:
                for first, stop in starts.tolist():
                    if stop > first:
                        file.seek(8 * width * first)
                        read = np.fromfile(file, np.int64, width * (stop - first))
                        parts.append(read.reshape(-1, width))
        return np.concatenate(parts)
