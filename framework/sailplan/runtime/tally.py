"""How often each key occurs among more rows than one process holds: sums over the counts, not the
counts themselves.

Ranks go through the parts, each of which gives its keys; equal keys of a part become one row (key,
count) that is sorted into a bucket on disk (`runtime.spill`), so that a key that every row has costs
a row a part. A bucket is counted by one rank. A rank holds a part or a bucket; the result is the same
bits at any number of ranks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.spill import Spill
from sailplan.runtime.turns import apart, in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

BUCKET_ROWS = 1 << 18
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Tally:
    """Sums over the keys of n rows; c is how many rows have a key."""

    rows: int
    distinct: int  # keys
    shared: int  # rows whose key another row has, too
    largest: int  # rows of one key
    log_sum: float  # of c ln c

    @property
    def entropy(self) -> float:
        """Nats of the distribution of keys over the rows."""
        return math.log(self.rows) - self.log_sum / self.rows if self.rows else 0.0


def tally(
    parallel: Parallel, folder: Path, parts: int, rows: int, keys_of: Callable[[int], Integers]
) -> Tally:
    """Return the tally of keys int64 that parts 0 .. parts - 1 give. Collective.

    folder: for files that are gone afterwards. rows: about how many there are. keys_of: reads a part.
    """
    buckets = max(1, -(-rows // BUCKET_ROWS))

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_main(parallel, f"making {folder}", clear)

    def sort() -> None:
        spill = Spill(folder, parallel.rank, buckets, 2)
        for part in range(parallel.rank, parts, parallel.world_size):
            alone()
            keys, counts = np.unique(keys_of(part), return_counts=True)
            spill.add(keys, np.stack([keys, counts], axis=1))
        spill.close()

    apart(parallel, f"counting in {folder}", sort)
    whole = np.zeros((buckets, 4), dtype=np.int64)
    logarithms = np.zeros(buckets)

    def count(bucket: int) -> None:
        found = Spill.read(folder, parallel.world_size, bucket, 2)
        found = found[np.argsort(found[:, 0], kind="stable")]
        first = np.flatnonzero(np.diff(found[:, 0], prepend=found[:1, 0] - 1))
        counts = np.add.reduceat(found[:, 1], first) if len(first) else found[:0, 1]
        largest = int(counts.max(initial=0))
        whole[bucket] = counts.sum(), len(counts), counts[counts > 1].sum(), largest
        logarithms[bucket] = (counts * np.log(counts)).sum()

    in_turns(parallel, f"counting in {folder}", range(buckets), count)
    whole, logarithms = sum_over_ranks(whole), sum_over_ranks(logarithms)
    on_main(parallel, f"removing {folder}", lambda: shutil.rmtree(folder, ignore_errors=True))
    return Tally(
        rows=int(whole[:, 0].sum()),
        distinct=int(whole[:, 1].sum()),
        shared=int(whole[:, 2].sum()),
        largest=int(whole[:, 3].max()),
        log_sum=math.fsum(logarithms),
    )
