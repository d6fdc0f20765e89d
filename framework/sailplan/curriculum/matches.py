"""Who belongs to whom in a pattern, by ids and without the rows of others: which target rows are
candidates, and which of them are none for a query.

A target that many records share is one candidate, at the first row that shows it. A query's right
targets are those of all records with the same query id (text or document), and an item is no
negative of itself where queries are items too. Ids meet through files in buckets (`runtime.spill`):

    FOLDER/pairs/0000012.npy     int64 [k, 2]: query and target id of the rows of part 12, -1, -1
                                 where a row is no match or lacks a side
    FOLDER/keys/B.npy            int64: rows of bucket B's candidates, rising
    FOLDER/facts/B.npy           int64 [f, 3]: query id, row of the candidate, target id (-1: the
                                 query itself), rising; B is the query id's bucket

What it costs for n rows: some 100 bytes a row of disk, and of memory a bucket's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.embed.search import Excluded
from sailplan.embed.table import Table
from sailplan.runtime.arrays import save
from sailplan.runtime.process import Parallel
from sailplan.runtime.spill import Spill, bucket_of
from sailplan.runtime.turns import apart, in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

PART = 1 << 14  # rows
BUCKET_ROWS, BUCKETS = 1 << 15, 16  # rows of a bucket, of which a rank has at most so many
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """The matches of n rows, on disk below `folder`."""

    folder: Path
    count: int  # rows
    size: int  # of a part
    buckets: int
    valid: Integers  # [parts] rows with two sides that match

    @property
    def parts(self) -> int:
        return -(-self.count // self.size)

    def pairs(self, part: int) -> Integers:
        """Return query and target ids int64 [k, 2] of a part's rows."""
        found: Integers = np.load(self.folder / "pairs" / f"{part:07d}.npy")
        return found

    def ids(self, start: int, stop: int) -> Integers:
        """Return query and target ids int64 [stop - start, 2]."""
        first, last = start // self.size, (max(start, stop - 1)) // self.size
        found = np.concatenate([self.pairs(part) for part in range(first, last + 1)])
        return found[start - first * self.size : stop - first * self.size]

    def valid_rows(self, numbers: Integers) -> Integers:
        """Return the rows of the valid ones number 0, 1, ...: rising int64 [k] -> [k]."""
        upto = np.concatenate([[0], np.cumsum(self.valid)])
        parts = np.searchsorted(upto, numbers, side="right") - 1
        found = [np.empty(0, dtype=np.int64)]
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(self.pairs(part)[:, 0] >= 0)
            found.append(part * self.size + rows[numbers[parts == part] - upto[part]])
        return np.concatenate(found)

    def keys(self, start: int, stop: int) -> Integers:
        """Return the rows of candidates among start .. stop - 1, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for bucket in range(self.buckets):
            rows = np.load(self.folder / "keys" / f"{bucket:07d}.npy", mmap_mode="r")
            found.append(rows[slice(*np.searchsorted(rows, [start, stop]).tolist())])
        return np.sort(np.concatenate(found))

    def facts(self, query_ids: Integers) -> Integers:
        """Return the facts int64 [f, 3] of these query ids: id, row of the candidate, target id."""
        wanted = np.unique(query_ids[query_ids >= 0])
        buckets = bucket_of(wanted, self.buckets)
        found = [np.empty((0, 3), dtype=np.int64)]
        for bucket in np.unique(buckets).tolist():
            facts = np.load(self.folder / "facts" / f"{bucket:07d}.npy", mmap_mode="r")
            asked, ids = wanted[buckets == bucket], facts[:, 0]
            first = np.searchsorted(ids, asked)
            lengths = np.searchsorted(ids, asked, side="right") - first
            inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            found.append(np.array(facts[np.repeat(first, lengths) + inside]))
        return np.concatenate(found)

    def excluded(self, query_ids: Integers) -> Excluded:
        """Return which candidates are no negatives of queries with these ids int64 [b]."""
        facts, wanted = self.facts(query_ids), np.unique(query_ids[query_ids >= 0])
        order = np.argsort(facts[:, 1], kind="stable")
        groups = np.searchsorted(wanted, query_ids)
        groups = np.where(query_ids >= 0, groups, -1)
        return Excluded(groups, np.searchsorted(wanted, facts[order, 0]), facts[order, 1])


def find_matches(
    parallel: Parallel,
    queries: Table,
    targets: Table,
    matched: Callable[[Integers], NDArray[np.bool_]],
    folder: Path,
) -> Matches:
    """Return the matches of the rows of two tables of equal length; matched: record positions [k]
    -> whether their sides match. Collective.
    """
    ranks, count = parallel.world_size, len(queries)
    size = max(1, min(PART, -(-count // ranks)))
    each = min(BUCKETS, -(-count // (ranks * BUCKET_ROWS)))
    parts, buckets = -(-count // size), ranks * max(1, each)
    for name in ("pairs", "keys", "facts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    valid = np.zeros(parts, dtype=np.int64)
    by_target = Spill(folder / "by_target", parallel.rank, buckets, 3)

    def read(part: int) -> None:
        start, stop = part * size, min(count, (part + 1) * size)
        left, right = queries.identify(start, stop), targets.identify(start, stop)
        good = left.valid & right.valid
        good[good] = matched(left.positions[good])
        found = np.stack([left.ids.numpy(), right.ids.numpy()], axis=1)
        found[~good] = -1
        save(folder / "pairs" / f"{part:07d}.npy", found)
        valid[part] = good.sum()
        rows, found = start + np.flatnonzero(good), found[good]
        # A row shows a target (its id, the row, the query's id); a query asks for itself (-1)
        shown = np.stack([found[:, 1], rows, found[:, 0]], axis=1)
        asked = np.unique(found[:, 0])
        itself = np.stack([asked, np.full(len(asked), -1), asked], axis=1)
        both = np.concatenate([shown, itself])
        by_target.add(both[:, 0], both)

    in_turns(parallel, "reading ids", range(parts), read)
    apart(parallel, "reading ids", by_target.close)
    by_query = Spill(folder / "by_query", parallel.rank, buckets, 3)

    def join_targets(bucket: int) -> None:
        found = Spill.read(folder / "by_target", ranks, bucket, 3)
        shown, asked = found[found[:, 1] >= 0], found[found[:, 1] < 0]
        shown = shown[np.lexsort((shown[:, 1], shown[:, 0]))]
        ids, first = np.unique(shown[:, 0], return_index=True)
        keys = shown[first, 1]
        save(folder / "keys" / f"{bucket:07d}.npy", np.sort(keys))
        facts = np.stack(
            [shown[:, 2], keys[np.searchsorted(ids, shown[:, 0])], shown[:, 0]], axis=1
        )
        place = np.searchsorted(ids, asked[:, 0]).clip(max=max(0, len(ids) - 1))
        there = ids[place] == asked[:, 0] if len(ids) else np.zeros(len(asked), dtype=bool)
        itself = np.stack(
            [asked[there, 0], keys[place[there]], np.full(int(there.sum()), -1)], axis=1
        )
        both = np.concatenate([facts, itself])
        by_query.add(both[:, 0], both)

    def join_queries(bucket: int) -> None:
        found = Spill.read(folder / "by_query", ranks, bucket, 3)
        save(folder / "facts" / f"{bucket:07d}.npy", np.unique(found, axis=0))

    in_turns(parallel, "joining targets", range(buckets), join_targets)
    apart(parallel, "joining targets", by_query.close)
    in_turns(parallel, "joining queries", range(buckets), join_queries)
    return Matches(folder, count, size, buckets, sum_over_ranks(valid))


def write_keys(
    parallel: Parallel, targets: Table, matches: Matches, rows_of_file: int
) -> list[tuple[Path, Path]]:
    """Write the candidates' vectors below the matches' folder, each rank those of its part of the
    rows; return the files with rows and vectors, in the order of rows. Collective.

    A vector that is not finite is no candidate.
    """
    folder, ranks = matches.folder / "vectors", parallel.world_size
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.zeros(ranks, dtype=np.int64)

    def work() -> None:
        first = matches.count * parallel.rank // ranks
        last = matches.count * (parallel.rank + 1) // ranks
        waiting: list[tuple[Integers, NDArray[np.float32]]] = []
        held = 0
        for start in range(first, last, matches.size):
            alone()
            rows = matches.keys(start, min(last, start + matches.size))
            for some in np.array_split(rows, -(-len(rows) // 2048) or 1):
                vectors = targets.take(some).fused.numpy()
                finite = np.isfinite(vectors).all(1)
                waiting.append((some[finite], vectors[finite]))
                held += int(finite.sum())
                if held >= rows_of_file:
                    write(waiting)
                    held = 0
        if held:
            write(waiting)

    def write(waiting: list[tuple[Integers, NDArray[np.float32]]]) -> None:
        stem = folder / f"{parallel.rank:05d}-{counts[parallel.rank]:07d}"
        save(stem.with_suffix(".vectors.npy"), np.concatenate([part[1] for part in waiting]))
        save(stem.with_suffix(".rows.npy"), np.concatenate([part[0] for part in waiting]))
        counts[parallel.rank] += 1
        waiting.clear()

    apart(parallel, "writing candidates", work)
    return [
        tuple(folder / f"{rank:05d}-{number:07d}.{name}.npy" for name in ("rows", "vectors"))  # type: ignore[misc]
        for rank, files in enumerate(sum_over_ranks(counts).tolist())
        for number in range(files)
    ]
